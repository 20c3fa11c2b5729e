"""A picture of one object, cut out, centred and scaled to what the world's cameras see of an object."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.text_to_3d.cut_out import cut_out

# Distance of the farthest visible point from the middle of an object's silhouette, in half-widths of the
# image: the mean over the world's objects and assemblies, 3 units away with a field of view of 35 degrees.
# The ball of radius 0.8 that holds them reaches 0.88.
EXTENT = 0.8
WORKING_SIDE = 512  # larger pictures are reduced to it
MIN_PIXELS = 32  # of the object's longer side
OPAQUE = 0.5


@dataclass(frozen=True)
class Picture:
    """An object's colours rgb (3, R, R) in [0, 1] and alpha (1, R, R), not premultiplied."""

    rgb: Tensor
    alpha: Tensor

    def over(self, background: Tensor) -> Tensor:
        """The object (B, 3, R, R) over backgrounds (B, 3)."""
        return self.rgb * self.alpha + background[:, :, None, None] * (1 - self.alpha)

    @property
    def rgba(self) -> Tensor:
        """All channels (4, R, R)."""
        return torch.cat([self.rgb, self.alpha])


def load_picture(path: Path | str, resolution: int) -> Picture:
    """The object of an image file, by its transparency or in front of a plain background, R = resolution.

    Raises `UserError` for a file that is no image, a background that is not plain and an object too small.
    """
    image = _open(path)
    values = np.asarray(image, np.float64) / 255
    if image.mode == "RGBA" and (values[..., 3] < OPAQUE).any():
        colours, alpha = values[..., :3], values[..., 3]
    else:
        colours, alpha = cut_out(values[..., :3], str(path))
    return normalise(colours, alpha, resolution, str(path))


def normalise(colours: np.ndarray, alpha: np.ndarray, resolution: int, name: str) -> Picture:
    """Colours (H, W, 3) and alpha (H, W) in [0, 1], centred and scaled to `EXTENT`.

    Raises `UserError`, which calls the picture `name`, where the object is too small or nowhere opaque.
    """
    rows, columns = np.nonzero(alpha > OPAQUE)
    size = max(np.ptp(rows), np.ptp(columns)) + 1 if len(rows) else 0
    if size < MIN_PIXELS:
        height = np.ptp(rows) + 1 if len(rows) else 0
        width = np.ptp(columns) + 1 if len(rows) else 0
        raise UserError(
            f"the object in {name} has {width} x {height} pixels: at least {MIN_PIXELS} along its longer "
            "side are expected, give a larger picture or one that shows it nearer"
        )
    centre = np.array([rows.min() + rows.max() + 1, columns.min() + columns.max() + 1]) / 2
    radius = np.hypot(rows + 0.5 - centre[0], columns + 0.5 - centre[1]).max() + 0.5
    half = float(radius) / EXTENT  # of the square that is shown, in pixels

    # A margin, so that the square lies within the image.
    margin = int(np.ceil(half)) + 1
    values = np.concatenate([colours, alpha[..., None]], 2)
    values = np.pad(values, ((margin, margin), (margin, margin), (0, 0)))
    image = Image.fromarray((values * 255 + 0.5).astype(np.uint8), "RGBA")
    top, left = centre + margin - half
    box = (left, top, left + 2 * half, top + 2 * half)
    square = image.resize((resolution, resolution), Image.Resampling.HAMMING, box)  # alpha premultiplied
    rgba = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255
    return Picture(rgba[:3], rgba[3:])


def _open(path: Path | str) -> Image.Image:
    """An image file, upright, as RGB or RGBA, its longer side at most `WORKING_SIDE`."""
    try:
        image: Image.Image = Image.open(path)
        image = ImageOps.exif_transpose(image)
        image = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"image {path} cannot be read ({error}): give a PNG, JPEG or WebP file of one object"
        ) from None
    scale = WORKING_SIDE / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(round(side * scale), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)
