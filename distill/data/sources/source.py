"""What a source of images is, and how one becomes a captioned image folder (`distill.data.folders`)."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from distill.data.images import read_image, square
from distill.runtime.config import as_mapping
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_folder, write_json

SPLITS = ("train", "validation", "test")
FACTS = "dataset.json"  # of a finished folder: its source, licence and counts


class LazyImage(ABC):
    """An image that is read when it is written; its text is its name in messages."""

    @abstractmethod
    def load(self) -> Image.Image:
        """The image in RGB or RGBA. Raises `UserError` for a damaged one."""


@final
@dataclass(frozen=True)
class DamagedImage(LazyImage):
    """What could not even be listed, such as the rest of a shard."""

    name: str
    reason: str

    def __str__(self) -> str:
        return self.name

    def load(self) -> Image.Image:
        """Raises `UserError`."""
        raise UserError(f"{self.name} cannot be read ({self.reason})")


@dataclass(frozen=True)
class Item:
    """An image, an array (H, W, 3 or 4) uint8 or a file, and what is known of it: its `text`, labels.

    split: one of `SPLITS` where the source has them, else "".
    """

    image: np.ndarray | Path | LazyImage
    row: Mapping[str, Any]
    split: str = ""


@dataclass(frozen=True)
class ImageSource(ABC):
    """Where images come from: the options of one format."""

    @property
    @abstractmethod
    def licence(self) -> str:
        """Under which the images may be used."""

    @abstractmethod
    def items(self, cache: Path) -> Sequence[Item]:
        """All images. cache: a folder for what is fetched. Raises `UserError` for what cannot be used."""


@dataclass(frozen=True)
class FolderOptions:
    """How a source is divided and written."""

    resolution: int | None = None  # image side in pixels, of the centre square; null: as the images are
    background: float | None = None  # grey level in [0, 1] behind transparent images; null: none
    # of the images of a source without splits, drawn by `seed`
    validation: float = 0.02
    test: float = 0.05
    seed: int = 0
    limit: int | None = None  # images of each split; null: all
    max_damaged: int = 0  # unreadable images that are left out, named and counted; one more is an error

    def __post_init__(self) -> None:
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise UserError(
                f"validation={self.validation:g} and test={self.test:g}: "
                "fractions that are below 1 together are expected"
            )
        if self.background is not None and not 0 <= self.background <= 1:
            raise UserError(f"background is {self.background:g}: expected a grey level in [0, 1], or null")
        for name in ("resolution", "limit"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: expected at least 1, or null")
        if self.max_damaged < 0:
            raise UserError(f"max_damaged is {self.max_damaged}: expected 0 or more")


def write_dataset(
    source: ImageSource, output: Path | str, options: FolderOptions, cache: Path | str
) -> dict[str, Any]:
    """Write the folder, whole or not at all; an older data set there is replaced. Returns dataset.json.

    Raises `UserError` for a source that cannot be used, for more damaged images than allowed, and where the
    folder holds something else.
    """
    divided = divide(source.items(Path(cache)), options)
    damaged: list[str] = []
    counts = {}
    with atomic_folder(output, FACTS, "a data set") as temporary:
        for split, items in divided.items():
            counts[split] = _write_split(temporary / split, items, options, damaged)
        facts = {
            "source": {"class": type(source).__name__, **as_mapping(source)},
            "options": as_mapping(options),
            "licence": source.licence,
            "counts": counts,
            "damaged": damaged,
        }
        write_json(temporary / FACTS, facts)
    return facts


def divide(items: Sequence[Item], options: FolderOptions) -> dict[str, list[Item]]:
    """The items of each split: the source's own, else by a permutation. Raises `UserError` without any."""
    if not items:
        raise UserError("the source holds no images: at least one is needed")
    own = [item for item in items if item.split]
    rest = [item for item in items if not item.split]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(options.seed)).tolist()
    test = round(options.test * len(rest))
    ends = (test, test + round(options.validation * len(rest)))
    indices = {"test": order[: ends[0]], "validation": order[ends[0] : ends[1]], "train": order[ends[1] :]}
    return {
        split: [
            *(item for item in own if item.split == split),
            *(rest[index] for index in sorted(indices[split])),
        ][: options.limit]
        for split in SPLITS
    }


def _write_split(folder: Path, items: Sequence[Item], options: FolderOptions, damaged: list[str]) -> int:
    """Write PNGs and metadata.jsonl; the number of images. Names of damaged ones are added to `damaged`."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for item in tqdm(items, desc=folder.name, unit="image", delay=2):
        try:
            image = _load(item.image, options)
        except UserError as error:
            damaged.append(str(item.image))
            if len(damaged) > options.max_damaged:
                raise UserError(
                    f"{error} ({len(damaged)} damaged: to leave out so many, give folder.max_damaged)"
                ) from None
            continue
        name = f"{len(rows):06d}.png"
        image.save(folder / name)
        rows.append({**item.row, "file_name": name})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return len(rows)


def _load(image: np.ndarray | Path | LazyImage, options: FolderOptions) -> Image.Image:
    if isinstance(image, np.ndarray):
        loaded = Image.fromarray(image)
    else:
        loaded = image.load() if isinstance(image, LazyImage) else read_image(image)
    if options.background is not None and loaded.mode == "RGBA":
        grey = round(255 * options.background)
        canvas = Image.new("RGBA", loaded.size, (grey, grey, grey, 255))
        loaded = Image.alpha_composite(canvas, loaded).convert("RGB")
    return loaded if options.resolution is None else square(loaded, options.resolution)
