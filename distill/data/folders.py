"""Captioned image folders: images beside a metadata.jsonl (the imagefolder convention of `datasets`)."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distill.data.images import BACKGROUND, read_pixels
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path

PATH = "path"  # in the rows of `load_split`: the image's file
CAPTION = "caption"  # in rows whose `text` is a prompt: the caption
MAPPED_BYTES = 4 * 2**30  # of a split's images, above which they are mapped from a file


@dataclass(frozen=True)
class CaptionedImages:
    """A split in memory: images (N, 3 or 4, H, W) uint8 and a metadata row per image, each with a `text`."""

    images: Tensor
    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> list[str]:
        return [row["text"] for row in self.rows]

    def composite(self, indices: Tensor | Sequence[int] | slice, background: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] over grey levels `background` (B,), by default fixed ones."""
        if not isinstance(indices, slice):
            indices = torch.as_tensor(indices, dtype=torch.long)  # a tuple would index dimensions
        images = self.images[indices].float() / 255
        if images.shape[1] == 3:
            return images

        levels = grey_levels(len(self))[indices] if background is None else background
        colour, alpha = images[:, :3], images[:, 3:]
        return colour * alpha + levels[:, None, None, None] * (1 - alpha)

    def to(self, device: torch.device) -> "CaptionedImages":
        """The same images on another device."""
        return CaptionedImages(self.images.to(device), self.rows)

    def with_prompts(self, prompt_of: Callable[[dict[str, Any]], str]) -> "CaptionedImages":
        """The same images; a row's text is its prompt (`Teacher.prompt_of`), and `CAPTION` what it was."""
        rows = [{**row, CAPTION: row["text"], "text": prompt_of(row)} for row in self.rows]
        return CaptionedImages(self.images, rows)

    def select(self, indices: Sequence[int]) -> "CaptionedImages":
        """The images at these indices."""
        images = self.images[torch.as_tensor(indices, dtype=torch.long)]
        return CaptionedImages(images, [self.rows[i] for i in indices])


def grey_levels(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Background levels (count,), uniform in `BACKGROUND`; the same at every call without a generator."""
    generator = generator or torch.Generator().manual_seed(0)
    low, high = BACKGROUND
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


def read_rows(folder: Path | str, keys: Sequence[str] = ("file_name", "text")) -> list[dict[str, Any]]:
    """The rows of a folder's metadata.jsonl.

    Raises `UserError` where the file is missing, is not JSON or lacks one of the `keys`.
    """
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: expected images beside a metadata.jsonl, file_name and text in each line"
        )

    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number} is not JSON ({error})") from None
        if not isinstance(row, dict) or not all(key in row for key in keys):
            raise UserError(f"{path}:{number} needs the keys {' and '.join(keys)}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty: at least one captioned image is needed")
    return rows


def load_split(
    folder: Path | str, split: str, resolution: int = 64, limit: int | None = None
) -> CaptionedImages:
    """One split of a captioned image folder (`folder/split/metadata.jsonl`), at most `limit` rows.

    Its rows name the image's file too, as `PATH`. Raises `UserError` for a missing folder or split, malformed
    rows and unreadable images.
    """
    folder = Path(folder) / split
    return load_rows(folder, rows_with_paths(folder, read_rows(folder)[:limit]), resolution)


def rows_with_paths(folder: Path | str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a split with the file of each image, which is the prompt of some teachers."""
    return [{**row, PATH: str(Path(folder) / row.get("file_name", ""))} for row in rows]


def load_rows(folder: Path, rows: list[dict[str, Any]], resolution: int) -> CaptionedImages:
    """The images of some rows of a folder's metadata. Raises `UserError` for unreadable ones.

    Beyond `MAPPED_BYTES` they are decoded once, into a file in `<folder>/.pixels`, and mapped from there.
    """
    if len(rows) * 4 * resolution**2 > MAPPED_BYTES:
        return CaptionedImages(_mapped_pixels(folder, rows, resolution), rows)
    images = [read_pixels(folder / row["file_name"], resolution) for row in rows]
    if len({image.shape[2] for image in images}) > 1:  # some have transparency: add it to the others
        opaque = np.full((resolution, resolution), 255, np.uint8)
        images = [image if image.shape[2] == 4 else np.dstack([image, opaque]) for image in images]
    return CaptionedImages(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), rows)


def _mapped_pixels(folder: Path, rows: list[dict[str, Any]], resolution: int) -> Tensor:
    """The images (N, 4, H, W), which stay on the disk until they are indexed."""
    files = [folder / row["file_name"] for row in rows]
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} does not exist: {folder}/metadata.jsonl names it")
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    path = folder / ".pixels" / f"{resolution}-{digest.hexdigest()[:16]}.npy"
    if not path.is_file():
        shape = len(files), 4, resolution, resolution
        with atomic_path(path) as temporary:
            pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            for index, file in enumerate(tqdm(files, f"{folder.name}, once", unit="image", mininterval=5)):
                image = read_pixels(file, resolution).transpose(2, 0, 1)
                pixels[index, : len(image)] = image
                pixels[index, len(image) :] = 255  # opaque
            pixels.flush()
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # c: torch expects writable memory


def batch_indices(count: int, size: int, step: int, seed: int) -> Tensor:
    """The indices (size,) of the batch at a step; a pure function, so that checkpoints need no data position.

    Batches are slices of an endless stream of permutations of `count` items, a new one per epoch.
    Raises `UserError` for a count or size below 1.
    """
    if count < 1 or size < 1:
        raise UserError(f"cannot sample batches of {size} from {count} items; expected at least one of each")
    first, end = step * size, (step + 1) * size
    epochs = range(first // count, (end - 1) // count + 1)
    slices = [_permutation(count, seed, e)[max(first - e * count, 0) : end - e * count] for e in epochs]
    return torch.cat(slices)


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    # the factor keeps the epochs of neighbouring seeds apart
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
