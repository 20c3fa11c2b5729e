"""Image files to arrays and tensors."""

from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.runtime.errors import UserError

BACKGROUND = (0.4, 1.0)  # range of the grey levels behind transparent training images
GREY = sum(BACKGROUND) / 2
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def load_image(path: Path | str, resolution: int, background: float = GREY) -> Tensor:
    """The centre square of an image file, (1, 3, resolution, resolution) in [0, 1], over a grey `background`.

    Another size is resampled by Lanczos; an opaque square image of the given resolution stays as it is.
    Raises `UserError` for a file that is no image.
    """
    image = torch.from_numpy(read_pixels(path, resolution).copy()).permute(2, 0, 1)[None].float() / 255
    if image.shape[1] == 3:
        return image
    colour, alpha = image[:, :3], image[:, 3:]
    return colour * alpha + background * (1 - alpha)


def read_pixels(path: Path | str, resolution: int) -> np.ndarray:
    """The same square as (resolution, resolution, C) uint8; C is 4 where the file has transparency, else 3.

    Raises `UserError` for a file that is no image.
    """
    return np.asarray(square(read_image(path), resolution))


def read_image(path: Path | str) -> Image.Image:
    """An image file in RGBA where it has transparency, else RGB. Raises `UserError` for another file."""
    return decode_image(path, str(path))


def decode_image(file: Path | str | IO[bytes], name: str) -> Image.Image:
    """The same of a path or an open file, which is called `name` in errors."""
    try:
        return as_rgb(Image.open(file))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be read as an image ({error}): give a PNG or JPEG file") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in RGBA where it has transparency, else RGB."""
    return image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")


def square(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square, resampled by Lanczos; an image of that size as it is."""
    if image.size == (resolution, resolution):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    centre = image.crop((left, top, left + side, top + side))
    return centre.resize((resolution, resolution), Image.Resampling.LANCZOS)


def is_image_file(text: str) -> bool:
    """Whether a prompt is a file. Raises `UserError` for one that is named as an image and does not exist."""
    try:
        exists = Path(text).is_file()
    except OSError:  # too long for a name
        exists = False
    if not exists and Path(text).suffix.lower() in SUFFIXES:
        raise UserError(f"{text} does not exist: give the path of an image file, or a text")
    return exists


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, by name. Raises `UserError` where there are none."""
    entries = folder.iterdir() if folder.is_dir() else ()
    files = sorted(path for path in entries if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no images: expected a folder with {', '.join(SUFFIXES)}")
    return files
