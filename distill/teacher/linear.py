"""A linear approximation of a VAE's encoder, cheap to differentiate: correct in colour, without detail.

Latents are close to an affine function of the colours of their cells, as the linear preview decoders of
Stable Diffusion show. A warm-up can therefore skip the encoder, as Latent-NeRF does by rendering latents
(Metzer et al. 2022, arXiv:2211.07600).
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
    explained: float  # fraction of the latents' variance over the fitted images (R^2)

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
    inputs = torch.cat([cells, torch.ones_like(cells[:, :1])], 1).double().cpu()
    outputs = latents.double().cpu()
    solution = torch.linalg.lstsq(inputs, outputs).solution

    variance = (outputs - outputs.mean(0)).square().sum()
    residual = (outputs - inputs @ solution).square().sum() / variance
    matrix, bias = solution[:3].T.to(images), solution[3].to(images)
    return LinearEncoder(matrix.contiguous(), bias, side, float(1 - residual))
