"""Linear approximations of a VAE's encoder and decoder, which cost next to nothing: colours, without detail.

Latents are close to an affine function of the colours of their cells, as the linear preview decoders of
Stable Diffusion show. A warm-up can therefore skip the encoder, as Latent-NeRF does by rendering latents
(Metzer et al. 2022, arXiv:2211.07600), and a residual in pixels the decoder.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.core.teacher import Teacher


@dataclass(frozen=True)
class LinearEncoder:
    """z = matrix (mean colour of the cell) + bias; matrix (C, 3), bias (C,), latents (C, side, side)."""

    matrix: Tensor
    bias: Tensor
    side: int
    explained: Tensor  # () fraction of the latents' variance over the fitted images (R^2)

    def __call__(self, images: Tensor) -> Tensor:
        """Latents (B, C, side, side) of images (B, 3, H, W) in [0, 1] of any resolution."""
        cells = F.adaptive_avg_pool2d(images, self.side)
        return torch.einsum("cd,bdhw->bchw", self.matrix, cells) + self.bias[:, None, None]


@torch.no_grad()
def fit_linear_encoder(teacher: Teacher, count: int = 64, seed: int = 0) -> LinearEncoder:
    """Least squares between the teacher's latents and the colours of `count` smooth random images."""
    generator = torch.Generator().manual_seed(seed)
    channels, side = teacher.latent_shape[:2]
    coarse = torch.rand(count, 3, max(side // 2, 2), max(side // 2, 2), generator=generator)
    size = (teacher.resolution, teacher.resolution)
    images = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False).to(teacher.device)

    latents = teacher.encode_images(images).permute(0, 2, 3, 1).reshape(-1, channels)
    cells = F.adaptive_avg_pool2d(images, side).permute(0, 2, 3, 1).reshape(-1, 3)
    weight, bias, explained = _least_squares(cells, latents)
    return LinearEncoder(weight, bias, side, explained)


def _least_squares(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (D, C), bias (D,) and R^2 of the affine fit of outputs (N, D) to inputs (N, C)."""
    x = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1).double()
    y = outputs.double()
    gram = x.T @ x
    solution = torch.linalg.solve(gram + 1e-12 * gram.diagonal().diag(), x.T @ y)
    residual = (y - x @ solution).square().sum() / (y - y.mean(0)).square().sum()
    coefficients = solution.T.to(outputs.dtype)
    return coefficients[:, :-1].contiguous(), coefficients[:, -1].contiguous(), 1 - residual


@dataclass(frozen=True)
class LinearDecoder:
    """Mean colours of cells from latents: a convolution of 3 x 3, weight (3, C, 3, 3) and bias (3,)."""

    weight: Tensor
    bias: Tensor
    factor: int  # pixels a side of a cell
    explained: Tensor  # () fraction of the colours' variance over the fitted images (R^2)

    def __call__(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of latents (B, C, h, w), of one colour a cell."""
        padded = F.pad(latents, (1, 1, 1, 1), mode="replicate")
        return self._enlarge(F.conv2d(padded, self.weight, self.bias).clamp(0, 1))

    def cells(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) with the mean colour of each cell."""
        return self._enlarge(F.avg_pool2d(images, self.factor))

    def _enlarge(self, cells: Tensor) -> Tensor:
        return F.interpolate(cells, scale_factor=self.factor, mode="nearest")


@torch.no_grad()
def fit_linear_decoder(teacher: Teacher, cells: int = 8192, seed: int = 0) -> LinearDecoder:
    """Least squares between the colours of at least so many cells of dead leaves, and their latents.

    Fitted to smooth images instead, it explains half as much of the teacher's own samples.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, side = teacher.latent_shape[:2]
    factor = teacher.resolution // side
    features, colours = [], []
    for _ in range(-(-cells // (4 * side**2))):  # four images at a time, which bounds the memory
        images = dead_leaves(4, teacher.resolution, generator).to(teacher.device)
        latents = F.pad(teacher.encode_images(images), (1, 1, 1, 1), mode="replicate")
        features.append(F.unfold(latents, 3).transpose(1, 2).flatten(0, 1))
        colours.append(F.avg_pool2d(images, factor).flatten(2).transpose(1, 2).flatten(0, 1))

    weight, bias, explained = _least_squares(torch.cat(features), torch.cat(colours))
    return LinearDecoder(weight.view(3, channels, 3, 3), bias, factor, explained)


def dead_leaves(count: int, side: int, generator: torch.Generator, discs: int = 30) -> Tensor:
    """Images (count, 3, side, side) in [0, 1] of random discs that occlude each other, on the CPU.

    Radii r have a density of r^-3, as objects in photographs (Lee, Mumford and Huang 2001).
    """
    steps = (torch.arange(side) + 0.5) / side * 2 - 1
    images = torch.rand(count, 3, 1, 1, generator=generator).expand(count, 3, side, side).clone()
    smallest, largest = 0.08, 0.8  # half-widths of the image
    for _ in range(discs):
        uniform = torch.rand(count, 1, 1, generator=generator)
        square = 1 / (largest**-2 + uniform * (smallest**-2 - largest**-2))
        x, y = (torch.rand(2, count, 1, 1, generator=generator) * 2 - 1) * 1.2
        inside = (steps - x).square() + (steps[:, None] - y).square() < square
        images = torch.where(inside[:, None], torch.rand(count, 3, 1, 1, generator=generator), images)
    return images
