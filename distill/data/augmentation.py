"""Random changes of image batches (B, 3, H, W) in [0, 1] that keep what is seen; each image draws its own amounts.

None mirrors by itself (sides are meaning) and none turns the hue.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def uniform(images: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    """One number an image, (B, 1, 1, 1)."""
    return low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator)


def some(images: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """Whether an image is chosen, (B, 1, 1, 1); small cues such as a nose need sharp images to be learnt."""
    return torch.rand(len(images), 1, 1, 1, generator=generator) < share


def move(images: Tensor, generator: torch.Generator, mirror: float = 0.0) -> Tensor:
    """Zoomed by 10 % and shifted by 5 % of the side at most, a share of them mirrored; the border goes on."""
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 0.9 + 0.2 * torch.rand(len(images), generator=generator)
    theta[:, :, 2] = 0.1 * (2 * torch.rand(len(images), 2, generator=generator) - 1)
    if mirror > 0:
        theta[:, 0] *= torch.where(torch.rand(len(images), 1, generator=generator) < mirror, -1.0, 1.0)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of them blended with a box blur of radius 1 or 2 pixels; a negative share sharpens."""
    radius = int(torch.randint(1, 3, (), generator=generator))
    blurred = F.avg_pool2d(F.pad(images, (radius,) * 4, mode="replicate"), 2 * radius + 1, stride=1)
    return images.lerp(blurred, uniform(images, generator, -0.5, 1.0) * some(images, generator, 0.5))


def relight(images: Tensor, generator: torch.Generator) -> Tensor:
    """Saturation, contrast and brightness; each image alone."""
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * uniform(images, generator, 0.75, 1.25)
    mean = images.mean((1, 2, 3), keepdim=True)
    contrasted = mean + (images - mean) * uniform(images, generator, 0.8, 1.2)
    return contrasted * uniform(images, generator, 0.8, 1.15)


def add_noise(images: Tensor, generator: torch.Generator, most: float) -> Tensor:
    """Half of them with Gaussian noise of a deviation up to `most`."""
    noise = torch.randn(images.shape, generator=generator) * uniform(images, generator, 0, most)
    return images + noise * some(images, generator, 0.5)


def cover(images: Tensor, generator: torch.Generator) -> Tensor:
    """A grey rectangle, at most a quarter of the side, on a fifth of the images (Zhong et al. 2017)."""
    side = images.shape[-1]
    pixels = torch.arange(side)
    size = uniform(images, generator, 0, side / 4), uniform(images, generator, 0, side / 4)
    start = uniform(images, generator, 0, side), uniform(images, generator, 0, side)
    rows = (pixels[:, None] >= start[0]) & (pixels[:, None] < start[0] + size[0])
    columns = (pixels >= start[1]) & (pixels < start[1] + size[1])
    chosen = rows & columns & some(images, generator, 0.2)
    return torch.where(chosen, uniform(images, generator, 0, 1), images)
