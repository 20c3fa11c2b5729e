"""Captions with their conditionings, and with latents where there are images: what a distillation reads."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distill.core.conditioning import Conditioning
from distill.core.teacher import Teacher
from distill.data.folders import grey_levels, load_rows, read_rows, rows_with_paths
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path


class PromptData(ABC):
    """Captioned items, read by their indices (B,) on the CPU."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of items."""

    @property
    @abstractmethod
    def uncond(self) -> Conditioning:
        """The empty prompt's conditioning, one row."""

    @abstractmethod
    def conditioning_of(self, indices: Tensor) -> Conditioning:
        """The conditioning of the captions (B rows)."""

    @abstractmethod
    def latents_of(self, indices: Tensor) -> Tensor:
        """Latents (B, C, h, w), float32, on the CPU. Raises `UserError` where there are no images."""


@final
class StreamedPrompts(PromptData):
    """Captions that are encoded each time they are read: their number is not limited by memory."""

    def __init__(self, teacher: Teacher, captions: Sequence[str], latents: Tensor | None = None) -> None:
        """latents (N, C, h, w), such as a memory-mapped file, where there are images."""
        self.teacher, self.captions, self.latents = teacher, captions, latents

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def uncond(self) -> Conditioning:
        """As of all prompt data."""
        return self.teacher.encode_text([""])

    def conditioning_of(self, indices: Tensor) -> Conditioning:
        """As of all prompt data, on the teacher's device."""
        return self.teacher.encode_text([self.captions[index] for index in indices.tolist()])

    def latents_of(self, indices: Tensor) -> Tensor:
        """As of all prompt data."""
        if self.latents is not None:
            return self.latents[indices].float()
        if len(indices):
            raise UserError("these are captions without images, which are needed here: give an image folder")
        return torch.empty(0, *self.teacher.latent_shape)


def load_prompts(teacher: Teacher, data: Path | str, images: bool, split: str = "train") -> StreamedPrompts:
    """The captions of a text file, one a line, or of a split of a captioned folder; with its latents if
    `images`.

    Raises `UserError` where there are none of them.
    """
    path = Path(data)
    if path.suffix != ".txt":
        rows = rows_with_paths(path / split, read_rows(path / split, ("text",)))
        captions = [teacher.prompt_of(row) for row in rows]
        latents = stream_latents(teacher, path, split) if images else None
        return StreamedPrompts(teacher, captions, latents)
    if images:
        raise UserError(
            f"{path} holds captions alone, and the discriminator and the monitor need real images: give a "
            "captioned image folder, or set method.gan=null and distill.monitor.every=0"
        )
    try:
        captions = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): expected a text file, a caption a line") from None
    if not captions:
        raise UserError(f"{path} is empty: expected a caption a line")
    return StreamedPrompts(teacher, captions)


def stream_latents(teacher: Teacher, folder: Path, split: str, batch: int = 64) -> Tensor:
    """Latents (N, C, h, w) of a split, float16, mapped from a file beside the images; encoded once.

    Neither all images nor all latents are in memory at any time. Raises `UserError` for unreadable images.
    """
    path = folder / ".latents" / f"{split}-{teacher.fingerprint()}.npy"
    if not path.is_file():
        _encode_images(teacher, folder / split, path, batch)
    try:
        return torch.from_numpy(np.load(path, mmap_mode="c"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, it will be computed again") from None


@torch.no_grad()
def _encode_images(teacher: Teacher, folder: Path, path: Path, batch: int) -> None:
    rows = read_rows(folder)
    levels = grey_levels(len(rows))
    with atomic_path(path) as temporary:
        shape = (len(rows), *teacher.latent_shape)
        latents = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
        for start in tqdm(range(0, len(rows), batch), desc="latents", unit="batch"):
            part = slice(start, start + batch)
            data = load_rows(folder, rows[part], teacher.resolution)
            images = data.composite(slice(None), levels[part]).to(teacher.device)
            latents[part] = teacher.encode_images(images).half().cpu().numpy()
        latents.flush()
