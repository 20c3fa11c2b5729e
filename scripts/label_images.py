"""Zero-shot labels of a folder's images by CLIP.

python scripts/label_images.py folder=photos "a red teapot" "a blue duck"
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from entry import entry

from distill.data.images import image_files, load_image
from distill.evaluation.clip import load_clip_scorer
from distill.runtime.errors import UserError
from distill.runtime.files import write_json
from distill.runtime.precision import PrecisionName, pick_precision
from distill.teacher.load import load_teacher, require_latent


@dataclass(frozen=True, kw_only=True)
class Config:
    """A folder of images and the captions to choose from."""

    teacher: str = "shapes64"
    clip: str | None = None  # a CLIP model of transformers; null: the teacher's own
    folder: str
    captions: tuple[str, ...]  # the labels, as captions; or arguments without a name
    output: str = "outputs/labels.json"
    device: str = "auto"  # auto: cuda when there is one
    precision: PrecisionName = "auto"  # of the networks; auto: bfloat16 on CUDA, float32 on a CPU


def main(config: Config) -> None:
    precision = pick_precision(config.device, config.precision)
    teacher = require_latent(load_teacher(config.teacher, precision.device, precision.dtype))
    for caption in config.captions:
        teacher.check_prompt(caption)
    clip = load_clip_scorer(config.teacher, config.clip, teacher.device)
    if clip is None:
        raise UserError(f"{config.teacher} holds no CLIP: give clip= a CLIP model of transformers")
    files = image_files(Path(config.folder))
    images = torch.cat([load_image(path, teacher.resolution) for path in files])
    probabilities = clip.label_probabilities(images, config.captions)
    for path, row in zip(files, probabilities, strict=True):
        print(f"{path.name:32} {config.captions[int(row.argmax())]:32} {float(row.max()):.3f}")
    rows = (dict(zip(config.captions, row.tolist(), strict=True)) for row in probabilities)
    write_json(config.output, {path.name: row for path, row in zip(files, rows, strict=True)})
    print(f"written: {config.output}")


if __name__ == "__main__":
    entry("label_images", Config, main, positional="captions")
