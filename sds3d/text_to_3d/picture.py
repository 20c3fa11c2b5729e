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


@dataclass(frozen=True)
class Frame:
    """Where an object lies on a square image: the middle of its silhouette's box, to the right and down from
    the image's middle, and its farthest point's distance from there, all in half-widths of the image.
    """

    right: float = 0.0
    down: float = 0.0
    extent: float = EXTENT


@dataclass(frozen=True)
class CutOut:
    """An object's colours (H, W, 3) and alpha (H, W) in [0, 1], of any size and place; `name` for errors."""

    colours: np.ndarray
    alpha: np.ndarray
    name: str

    def __post_init__(self) -> None:
        """Raises `UserError` where the object is too small or nowhere opaque."""
        rows, columns = np.nonzero(self.alpha > OPAQUE)
        height, width = (int(np.ptp(index)) + 1 if len(index) else 0 for index in (rows, columns))
        if max(height, width) < MIN_PIXELS:
            raise UserError(
                f"the object in {self.name} has {width} x {height} pixels: at least {MIN_PIXELS} along its "
                "longer side are expected, give a larger picture or one that shows it nearer"
            )

    def picture(self, resolution: int, frame: Frame = Frame()) -> Picture:
        """The object on a square image of R = resolution pixels a side, placed as `frame` says."""
        (centre,), (radius,) = silhouette_bounds(torch.from_numpy(self.alpha)[None])
        half = float(radius) / frame.extent  # of the square that is shown, in pixels
        left, top = (centre.numpy() - half * (1 + np.array([frame.right, frame.down]))).tolist()
        # Margins, so that the square lies within the image.
        height, width = self.alpha.shape
        outside = max(-left, -top, left + 2 * half - width, top + 2 * half - height, 0.0)
        margin = int(np.ceil(outside)) + 1
        values = np.concatenate([self.colours, self.alpha[..., None]], 2)
        values = np.pad(values, ((margin, margin), (margin, margin), (0, 0)))
        image = Image.fromarray((values * 255 + 0.5).astype(np.uint8), "RGBA")
        left, top = left + margin, top + margin
        box = (left, top, left + 2 * half, top + 2 * half)
        square = image.resize((resolution, resolution), Image.Resampling.HAMMING, box)  # alpha premultiplied
        rgba = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255
        return Picture(rgba[:3], rgba[3:])


def silhouette_bounds(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Middles (B, 2), right and down in pixels from the corner, of the boxes of silhouettes alpha (B, H, W),
    and the distances (B,) of their farthest points from there; not a number where nothing is opaque.
    """
    opaque = alpha > OPAQUE
    middles = []
    for axis in (1, 2):  # columns, then rows
        hit = opaque.any(axis)
        index = torch.arange(hit.shape[1], device=alpha.device).expand_as(hit)
        first = index.masked_fill(~hit, hit.shape[1]).amin(1)
        last = index.masked_fill(~hit, -1).amax(1)
        middles.append((first + last + 1) / 2)
    right, down = middles
    rows, columns = (torch.arange(side, device=alpha.device) + 0.5 for side in alpha.shape[1:])
    distance = torch.hypot(columns - right[:, None, None], rows[:, None] - down[:, None, None])
    radius = distance.masked_fill(~opaque, -torch.inf).flatten(1).amax(1) + 0.5
    return torch.stack(middles, 1), radius.masked_fill(~opaque.flatten(1).any(1), torch.nan)


def load_cut_out(path: Path | str) -> CutOut:
    """The object of an image file, by its transparency or in front of a plain background.

    Raises `UserError` for a file that is no image, a background that is not plain and an object too small.
    """
    image = _open(path)
    values = np.asarray(image, np.float64) / 255
    if image.mode == "RGBA" and (values[..., 3] < OPAQUE).any():
        colours, alpha = values[..., :3], values[..., 3]
    else:
        colours, alpha = cut_out(values[..., :3], str(path))
    return CutOut(colours, alpha, str(path))


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
