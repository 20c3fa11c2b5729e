"""Pictures that an adapter is conditioned on: of an image itself (silhouette, edges, scribble), or beside it in its folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data.folders import CaptionedImages
from distill.data.images import open_image
from distill.runtime.errors import UserError

COLUMN = "conditioning_image"  # as in diffusers' ControlNet training and the data sets made for it


def silhouettes(data: CaptionedImages) -> Tensor:
    """(N, 1, H, W) uint8, white where the object is: a picture's own alpha. Raises `UserError` for pictures without one."""
    if data.images.shape[1] != 4:
        raise UserError(
            "a silhouette is an image's alpha channel: these images have none, choose condition=edges or scribble"
        )
    return data.images[:, 3:]


def edges(images: Tensor, blur: float = 1.0, low: float = 0.04, high: float = 0.12) -> Tensor:
    """(N, 1, H, W) uint8: Canny's edges (1986) of images (N, 3, H, W) in [0, 1], the strongest of the three colours' at each pixel."""
    from skimage.feature import canny

    found = [np.any([canny(colour, blur, low, high) for colour in image], 0) for image in images.numpy()]
    return torch.from_numpy(np.stack(found)[:, None].astype(np.uint8) * 255)


def scribbles(images: Tensor) -> Tensor:
    """(N, 1, H, W) uint8: few broad lines, as of a hand: edges of a blurred image, three pixels wide."""
    from scipy.ndimage import binary_dilation

    drawn = edges(images, blur=2.0).numpy() > 0
    return torch.from_numpy(binary_dilation(drawn, np.ones((1, 1, 3, 3), bool)).astype(np.uint8) * 255)


def beside(folder: Path | str, data: CaptionedImages) -> Tensor:
    """(N, 3, H, W) uint8: the files that a split's rows name as `conditioning_image`. Raises `UserError` where there are none."""
    place, size = Path(folder), data.images.shape[-1]
    missing = next((row["file_name"] for row in data.rows if not row.get(COLUMN)), None)
    if missing is not None:
        raise UserError(
            f"{place}: {missing} has no {COLUMN} in metadata.jsonl: add the column, or choose a condition made of the image"
        )
    found = [open_image(place / row[COLUMN], size)[..., :3] for row in data.rows]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def _in_parts(make: Callable[[Tensor], Tensor], data: CaptionedImages, size: int = 500) -> Tensor:
    return torch.cat([make(data.composite(part)) for part in torch.arange(len(data)).split(size)])


def of_images(condition: str, folder: Path | str, data: CaptionedImages) -> Tensor:
    """The pictures (N, 1 or 3, H, W) uint8 of a split, by name: silhouette, edges, scribble, or `folder` for those beside the images."""
    makers: dict[str, Callable[[], Tensor]] = {
        "silhouette": lambda: silhouettes(data),
        "edges": lambda: _in_parts(edges, data),
        "scribble": lambda: _in_parts(scribbles, data),
        "folder": lambda: beside(folder, data),
    }
    if condition not in makers:
        raise UserError(f"condition {condition!r} is none of {', '.join(makers)}")
    return makers[condition]()


def as_input(pictures: Tensor) -> Tensor:
    """What an adapter takes, (B, 3, H, W) in [0, 1], of uint8 pictures (B, 1 or 3, H, W)."""
    return (pictures.float() / 255).expand(-1, 3, -1, -1)
