"""Label-preserving augmentations of image batches (B, 3, H, W) in [0, 1]; amounts are sampled per image.

Images and generator must be on one device. None mirrors by default (left and right can be labels) and none
changes the hue.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def uniform(images: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    """One uniform number per image, (B, 1, 1, 1)."""
    return low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)


def bernoulli_mask(images: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    """Which images are selected, (B, 1, 1, 1) bool; each with `probability`."""
    return torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < probability


def random_affine(images: Tensor, generator: torch.Generator, mirror: float = 0.0) -> Tensor:
    """Zoom by up to 10 %, shift by up to 5 % of the side, mirror with a probability; border replicated."""
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 0.9 + 0.2 * uniform(images, generator, 0, 1).flatten()
    shift = torch.rand(len(images), 2, generator=generator, device=images.device)
    theta[:, :, 2] = 0.1 * (2 * shift - 1)
    if mirror > 0:
        theta[:, 0] *= torch.where(bernoulli_mask(images, generator, mirror)[:, 0, 0], -1.0, 1.0)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def blur_sharpen(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images blended with a box blur of radius 1 or 2 pixels; a negative weight sharpens.

    The other half stays sharp: small features, such as a nose, are visible in sharp images only.
    """
    radius = int(torch.randint(1, 3, (), generator=generator, device=images.device))
    blurred = F.avg_pool2d(F.pad(images, (radius,) * 4, mode="replicate"), 2 * radius + 1, stride=1)
    weight = uniform(images, generator, -0.5, 1.0) * bernoulli_mask(images, generator, 0.5)
    return images.lerp(blurred, weight)


def color_jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random saturation, contrast and brightness."""
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * uniform(images, generator, 0.75, 1.25)
    mean = images.mean((1, 2, 3), keepdim=True)
    contrasted = mean + (images - mean) * uniform(images, generator, 0.8, 1.2)
    return contrasted * uniform(images, generator, 0.8, 1.15)


def add_noise(images: Tensor, generator: torch.Generator, max_std: float) -> Tensor:
    """Gaussian noise on half of the images, its standard deviation uniform up to `max_std`."""
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    noise *= uniform(images, generator, 0, max_std)
    return images + noise * bernoulli_mask(images, generator, 0.5)


def random_erasing(images: Tensor, generator: torch.Generator) -> Tensor:
    """A grey rectangle of at most a quarter of the side, on a fifth of the images (Zhong et al. 2017)."""
    side = images.shape[-1]
    pixels = torch.arange(side, device=images.device)
    size = uniform(images, generator, 0, side / 4), uniform(images, generator, 0, side / 4)
    start = uniform(images, generator, 0, side), uniform(images, generator, 0, side)
    rows = (pixels[:, None] >= start[0]) & (pixels[:, None] < start[0] + size[0])
    columns = (pixels >= start[1]) & (pixels < start[1] + size[1])
    erased = rows & columns & bernoulli_mask(images, generator, 0.2)
    return torch.where(erased, uniform(images, generator, 0, 1), images)
