"""Condition images for adapters: derived from images (silhouettes, edges, lines), or files of a folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data.folders import CaptionedImages
from distill.data.images import read_pixels
from distill.runtime.errors import UserError

SOFT_SCALES, SOFT_GAIN = (0.7, 1.4, 2.8), 4.0  # pixels; a sharp edge of two thirds of the range is white
COLUMN = "conditioning_image"  # as in diffusers' ControlNet training and the data sets for it


def silhouettes(data: CaptionedImages) -> Tensor:
    """(N, 1, H, W) uint8, an image's own alpha. Raises `UserError` for images without one."""
    if data.images.shape[1] != 4:
        raise UserError(
            "a silhouette is an image's alpha channel: these images have none, "
            "choose condition=edges or scribble"
        )
    return data.images[:, 3:]


def edges(images: Tensor, blur: float = 1.0, low: float = 0.04, high: float = 0.12) -> Tensor:
    """(N, 1, H, W) uint8: Canny edges (1986) of any colour channel of images (N, 3, H, W) in [0, 1]."""
    from skimage.feature import canny

    masks = [np.any([canny(channel, blur, low, high) for channel in image], 0) for image in images.numpy()]
    return torch.from_numpy(np.stack(masks)[:, None].astype(np.uint8) * 255)


def scribbles(images: Tensor) -> Tensor:
    """(N, 1, H, W) uint8: a few broad lines as drawn by hand, edges of a blurred image 3 pixels wide."""
    from scipy.ndimage import binary_dilation

    lines = edges(images, blur=2.0).numpy() > 0
    return torch.from_numpy(binary_dilation(lines, np.ones((1, 1, 3, 3), bool)).astype(np.uint8) * 255)


def soft_edges(images: Tensor) -> Tensor:
    """(N, 1, H, W) uint8: how strong edges are, of images (N, 3, H, W) in [0, 1].

    The place of HED's maps (Xie and Tu 2015, arXiv:1504.06375), which come of a trained network: the largest
    gradient of a colour channel, averaged over three scales.
    """
    from scipy.ndimage import gaussian_filter

    strength = torch.zeros(len(images), *images.shape[2:])
    for scale in SOFT_SCALES:
        blur = (0, 0, scale, scale)
        across, down = (
            gaussian_filter(images.numpy(), blur, order, mode="nearest")
            for order in ((0, 0, 0, 1), (0, 0, 1, 0))
        )
        strength += scale * torch.from_numpy(np.hypot(across, down).max(1)) / len(SOFT_SCALES)
    return (strength * SOFT_GAIN * 255).clamp(0, 255).round().to(torch.uint8)[:, None]


def straight_lines(images: Tensor) -> Tensor:
    """(N, 1, H, W) uint8: straight segments of the edges of images (N, 3, H, W) in [0, 1].

    The place of M-LSD's (Gu et al. 2021, arXiv:2106.00186), by the probabilistic Hough transform.
    """
    from skimage.draw import line
    from skimage.transform import probabilistic_hough_line

    segments = torch.zeros(len(images), 1, *images.shape[2:], dtype=torch.uint8)
    shortest = max(images.shape[-1] // 8, 3)
    for image, canvas in zip(edges(images)[:, 0].numpy(), segments[:, 0].numpy(), strict=True):
        for (x0, y0), (x1, y1) in probabilistic_hough_line(image, shortest, shortest, 1, rng=0):
            canvas[line(y0, x0, y1, x1)] = 255
    return segments


def listed_images(folder: Path | str, data: CaptionedImages) -> Tensor:
    """(N, 3, H, W) uint8: the files in the rows' column `conditioning_image`, relative to a split's folder.

    Raises `UserError` where a row has none.
    """
    missing = next((row["file_name"] for row in data.rows if not row.get(COLUMN)), None)
    if missing is not None:
        raise UserError(
            f"{folder}: {missing} has no {COLUMN} in metadata.jsonl: add the column, "
            "or choose a condition derived from the image"
        )
    size = data.images.shape[-1]
    pixels = [read_pixels(Path(folder) / row[COLUMN], size)[..., :3] for row in data.rows]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def condition_images(condition: str, folder: Path | str, data: CaptionedImages) -> Tensor:
    """Condition images (N, 1 or 3, H, W) uint8 of the split in `folder`.

    condition: silhouette, edges, scribble, soft_edges, lines, or `folder` for `listed_images`. Raises
    `UserError` for another.
    """
    functions: dict[str, Callable[[], Tensor]] = {
        "silhouette": lambda: silhouettes(data),
        "edges": lambda: _in_batches(edges, data),
        "scribble": lambda: _in_batches(scribbles, data),
        "soft_edges": lambda: _in_batches(soft_edges, data),
        "lines": lambda: _in_batches(straight_lines, data),
        "folder": lambda: listed_images(folder, data),
    }
    if condition not in functions:
        raise UserError(f"condition {condition!r} is none of {', '.join(functions)}")
    return functions[condition]()


def _in_batches(function: Callable[[Tensor], Tensor], data: CaptionedImages, size: int = 500) -> Tensor:
    batches = torch.arange(len(data)).split(size)
    return torch.cat([function(data.composite(indices)) for indices in batches])


def adapter_input(images: Tensor) -> Tensor:
    """Condition images (B, 1 or 3, H, W) uint8 as an adapter's input (B, 3, H, W) in [0, 1]."""
    return (images.float() / 255).expand(-1, 3, -1, -1)
