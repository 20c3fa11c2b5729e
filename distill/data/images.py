"""Image files to tensors."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.runtime.errors import UserError

BACKGROUND = (0.4, 1.0)  # grey levels that transparent images are laid on


IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def open_image(path: Path, resolution: int) -> np.ndarray:
    """(H, W, 3 or 4) uint8, cut square and resized where it is not. Raises `UserError` for what is no image."""
    try:
        image = Image.open(path)
        image = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an image ({error})") from None
    if image.size != (resolution, resolution):
        side = min(image.size)  # centre crop, then resize
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize(
            (resolution, resolution), Image.Resampling.LANCZOS
        )
    return np.asarray(image)


def composite_over(pixels: np.ndarray) -> Tensor:
    """An image (1, 3, H, W) in [0, 1] of (H, W, 3 or 4) uint8, what is transparent on the middle of the grey levels."""
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    return (
        image
        if image.shape[1] == 3
        else image[:, :3] * image[:, 3:] + sum(BACKGROUND) / 2 * (1 - image[:, 3:])
    )


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, by name. Raises `UserError` where there are none."""
    files = (
        sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGES) if folder.is_dir() else []
    )
    if not files:
        raise UserError(f"{folder} holds no images: expected a folder with {', '.join(IMAGES)}")
    return files
