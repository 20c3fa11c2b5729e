"""Silhouettes of objects before a plain grey background, whose level is not known."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

BORDER = 2  # pixels at the image's edges, most of which show the background
CONTRAST = 0.015  # least difference of a channel to the background; a decoded background varies by less
COVERAGE = 0.3  # of the largest difference beside a pixel: below, the background covers most of it
RIM = 0.06  # least difference of an object to the background whose rim has such pixels
SPECK, HOLE = 6, 6  # pixels of the largest part that is noise, and of the largest hole
MIN_PART = 0.02  # of the largest part, likewise


def background_levels(images: Tensor) -> Tensor:
    """The colour (N, 3) of the background of images (N, 3, H, W): the median of the pixels at the edges."""
    edge = torch.ones(images.shape[-2:], dtype=torch.bool, device=images.device)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    return images[..., edge].median(-1).values


def segment(images: Tensor) -> Tensor:
    """Silhouettes (N, H, W) bool, on the CPU, of images (N, 3, H, W) in [0, 1] with a plain background.

    A pixel belongs to the object where it differs from the background by `CONTRAST`, except at the object's
    rim, where it must differ by a fraction of what its neighbours do. Lines of one or two pixels through the
    object are closed: there its shading passes through the level of the background. Holes that are seen
    through, as a torus has, stay.
    """
    images = images.detach().float().cpu()
    difference = (images - background_levels(images)[:, :, None, None]).abs().amax(1)
    largest = F.max_pool2d(difference[:, None], 3, stride=1, padding=1)[:, 0]
    raw = (difference > CONTRAST) & ((difference > COVERAGE * largest) | (largest < RIM))
    return torch.from_numpy(np.stack([_cleaned(mask) for mask in raw.numpy()]))


def _cleaned(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask (H, W) without thin gaps, small parts and small holes."""
    mask = ndimage.binary_closing(np.pad(mask, 2), np.ones((3, 3)))[2:-2, 2:-2]
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if count:
        sizes = np.bincount(labels.ravel())[1:]
        large = 1 + np.flatnonzero(sizes >= max(SPECK, MIN_PART * sizes.max()))
        mask = np.isin(labels, large)
    holes, count = ndimage.label(~mask)
    small = 1 + np.flatnonzero(np.bincount(holes.ravel(), minlength=1)[1:] <= HOLE)
    return mask | np.isin(holes, small)
