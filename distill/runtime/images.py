"""Image tensors to bytes, grids and PNG files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path


def image_grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Images (B, 3, H, W) in rows of `columns`, white gaps of `gap` pixels between, as one (3, H', W').

    Raises `UserError` for another shape or an empty batch.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise UserError(f"images have the shape {tuple(images.shape)}; expected (B, 3, H, W) with B > 0")
    images = images.detach().float().cpu()
    count, _, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)

    grid = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return grid


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (..., 3, H, W) in [0, 1] as (..., H, W, 3) uint8; other values are clamped, NaN is 0."""
    levels = images.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    return levels.movedim(-3, -1).contiguous().cpu().numpy()


def save_png(path: Path | str, image: Tensor) -> None:
    """Write an image (3, H, W) in [0, 1], converted by `to_bytes`, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(to_bytes(image)).save(temporary)
