"""The images of a data set that are nearest to texts or to other images, by CLIP's embeddings.

python scripts/nearest_images.py "a red teapot" data=outputs/shapes64
Copies of the data?  python scripts/nearest_images.py outputs/samples/000_00.png split=train
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from entry import entry

from distill.data.folders import PATH, load_split
from distill.data.images import is_image_file, load_image
from distill.evaluation.clip import load_text_scorer
from distill.runtime.errors import UserError
from distill.runtime.files import write_json
from distill.runtime.images import image_grid, save_png
from distill.runtime.machine import pick_device


@dataclass(frozen=True, kw_only=True)
class Config:
    """Queries, the images that are searched, and the CLIP that compares them."""

    queries: tuple[str, ...]  # texts, or image files; or arguments without a name
    data: str = "outputs/shapes64"  # a captioned image folder
    split: Literal["train", "validation", "test"] = "test"
    clip: str = "shapes64"  # a teacher with its CLIP, or a CLIP model of transformers
    count: int = 8  # images of each query
    limit: int | None = None  # images searched; null: all of the split
    resolution: int = 64
    output: str = "outputs/nearest.png"  # a row a query, an image query first; figures beside it, as JSON
    device: str = "auto"  # auto: cuda when there is one


def main(config: Config) -> None:
    if config.count < 1:
        raise UserError(f"count is {config.count}: expected at least one image a query")
    images = [is_image_file(query) for query in config.queries]
    if any(images) and not all(images):
        raise UserError("some queries are image files and others are not: give texts alone, or files alone")
    clip = load_text_scorer(config.clip, () if all(images) else config.queries, pick_device(config.device))
    data = load_split(config.data, config.split, config.resolution, config.limit)
    pictures = data.composite(slice(None))
    if all(images):
        query_images = torch.cat([load_image(query, config.resolution) for query in config.queries])
        queries = clip.image_features(query_images)
    else:
        queries = clip.text_features(config.queries)
    count = min(config.count, len(data))
    cosines, nearest = (queries @ clip.image_features(pictures).T).topk(count)
    rows = pictures[nearest]  # (Q, count, 3, H, W)
    if all(images):
        rows = torch.cat([query_images[:, None], rows], 1)
    for query, values, indices in zip(config.queries, cosines, nearest, strict=True):
        print(f"{query}: {data.texts[int(indices[0])]} ({float(values[0]):.3f})")
    save_png(Path(config.output), image_grid(rows.flatten(0, 1), rows.shape[1]))
    results = {
        query: [
            {"file": data.rows[index][PATH], "text": data.texts[index], "cosine": cosine}
            for index, cosine in zip(indices.tolist(), values.tolist(), strict=True)
        ]
        for query, values, indices in zip(config.queries, cosines, nearest, strict=True)
    }
    path = Path(config.output).with_suffix(".json")
    write_json(path, results)
    print(f"written: {config.output}, {path}")


if __name__ == "__main__":
    entry("nearest_images", Config, main, positional="queries")
