"""Sampling of views in groups, and the silhouettes and errors of images against true views."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel

from distill.core.conditioning import Conditioning
from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.core.teacher import Teacher
from distill.runtime.errors import UserError
from distill.teacher.vae import psnr


@dataclass(frozen=True)
class SamplingOptions:
    """DDIM with classifier-free guidance, `batch` rows at a time, or fewer: whole groups."""

    steps: int = 50
    guidance: float = 2.0
    batch: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1:
            raise UserError(f"steps={self.steps}, batch={self.batch}: at least 1 of each is expected")


@dataclass(frozen=True)
class ViewTeacher:
    """A teacher that is conditioned on cameras, with the CLIP whose picture embedding it reads, if any."""

    teacher: Teacher
    clip: CLIPModel | None
    options: SamplingOptions

    @torch.no_grad()
    def sample(self, cond: Conditioning, uncond: Conditioning, name: str, seed: int = 0) -> Tensor:
        """Images (N, 3, H, W) in [0, 1], on the CPU, of N rows; `uncond` has one row or N.

        The noise is a function of the option `seed`, of the argument and of a row's position.
        """
        options = self.options
        generator = torch.Generator().manual_seed(options.seed + 1_000_003 * seed)
        noise = torch.randn(len(cond), *self.teacher.latent_shape, generator=generator)
        size = max(options.batch // cond.views, 1) * cond.views
        parts = torch.arange(len(cond)).split(size)
        images = []
        for part in tqdm(parts, name, leave=False, unit="batch", mininterval=5):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            negative = uncond if len(uncond) == 1 else uncond.select(rows)
            model = Guided(self.teacher, negative, options.guidance)
            x_t = noise[rows].to(self.teacher.device)
            latents = sample_ode(model, self.teacher.scheduler, cond.select(rows), x_t, options.steps)
            images.append(self.teacher.decode(latents).cpu())
        return torch.cat(images)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) encoded to latents and decoded, on the CPU: the ceiling of samples."""
        parts = images.split(self.options.batch)
        encoded = (self.teacher.encode_images(part.to(self.teacher.device)) for part in parts)
        return torch.cat([self.teacher.decode(latents).cpu() for latents in encoded])


def silhouette_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union (N,) of silhouettes (N, H, W) bool; 1 where both are empty."""
    union = (first | second).sum((1, 2))
    return torch.where(union > 0, (first & second).sum((1, 2)) / union.clamp_min(1), 1.0)


def image_psnr(first: Tensor, second: Tensor) -> Tensor:
    """PSNR (N,) in dB, at most 60, between images (N, 3, H, W) in [0, 1]."""
    return psnr((first - second).square().flatten(1).mean(1).clamp_min(1e-6))
