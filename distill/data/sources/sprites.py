"""Small images with a context vector, as a pair of NumPy files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from distill.data.sources.source import ImageSource, Item
from distill.runtime.errors import UserError


@final
@dataclass(frozen=True)
class SpritesSource(ImageSource):
    """Images (N, H, W, 3), uint8 or in [0, 1], and contexts (N, K). Rows: `text` and the `context`.

    The text is the name of the largest part of the context.
    """

    images: str  # a .npy file
    contexts: str  # a .npy file
    names: tuple[str, ...] = ("hero", "non-hero", "food", "spell", "side-facing")

    @property
    def licence(self) -> str:
        """As of every source."""
        return "the user's own files"

    def items(self, cache: Path) -> Sequence[Item]:
        """As of every source."""
        images, contexts = read_npy(self.images), read_npy(self.contexts)
        if images.ndim != 4 or images.shape[3] != 3 or not len(images):
            raise UserError(f"{self.images} has the shape {images.shape}: expected (N, H, W, 3)")
        if contexts.shape != (len(images), len(self.names)):
            raise UserError(
                f"{self.contexts} has the shape {contexts.shape}: expected "
                f"({len(images)}, {len(self.names)}), a row an image and a column for each of "
                f"{', '.join(self.names)}"
            )
        for name, values in ((self.images, images), (self.contexts, contexts)):
            if not np.isfinite(values).all():
                raise UserError(f"{name} holds values that are not finite (NaN): repair it")
        if contexts.min() < 0 or contexts.max() > 1:
            raise UserError(f"{self.contexts} holds values outside [0, 1]: expected shares of each context")
        if images.dtype != np.uint8:
            if images.min() < 0 or images.max() > 1:
                raise UserError(f"{self.images} holds {images.dtype} outside [0, 1]: give uint8, or [0, 1]")
            images = np.round(images * 255).astype(np.uint8)
        return [
            Item(
                image,
                {
                    "text": self.names[int(context.argmax())],
                    "context": dict(zip(self.names, context.tolist(), strict=True)),
                },
            )
            for image, context in zip(images, contexts.astype(float), strict=True)
        ]


def read_npy(path: str) -> np.ndarray:
    """The numbers of a .npy file, which is never unpickled. Raises `UserError` for another file."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a .npy file of numbers") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif":
        raise UserError(f"{path} holds no array of numbers: give a .npy file of numbers")
    return array
