"""The denoising error of a teacher on held-out images, by noise level and by its conditions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.teacher import Teacher
from distill.core.views import POSE
from distill.data.folders import CaptionedImages

LEVELS = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)  # t / T


@dataclass(frozen=True)
class DenoisingErrors:
    """Mean squared error of v by t / T, where v = alpha eps - sigma x0 (arXiv:2202.00512)."""

    by_level: dict[float, float]

    @property
    def mean(self) -> float:
        """The mean over the levels."""
        return sum(self.by_level.values()) / len(self.by_level)


@torch.no_grad()
def denoising_errors(
    teacher: Teacher, latents: Tensor, conditioning: Conditioning, batch: int = 64, seed: int = 0
) -> DenoisingErrors:
    """Errors on latents (N, C, h, w), the same noise for every teacher of that latent shape."""
    schedule = teacher.schedule
    by_level = {}
    for level in LEVELS:
        generator = torch.Generator().manual_seed(seed)
        total = 0.0
        for part in torch.arange(len(latents)).split(batch):
            clean = latents[part].to(teacher.device)
            noise = torch.randn(clean.shape, generator=generator).to(teacher.device)
            t = torch.full((len(part),), round(level * (schedule.num_train_timesteps - 1)))
            t = t.to(teacher.device)
            prediction = teacher.predict(
                schedule.add_noise(clean, noise, t), t, conditioning.select(part).to(teacher.device)
            )
            error = prediction.v - schedule.velocity(clean, noise, t)
            total += float(error.square().mean()) * len(part)
        by_level[level] = total / len(latents)
    return DenoisingErrors(by_level)


def poses_of(data: CaptionedImages) -> Tensor | None:
    """The poses (N, 5) of a split, where its rows have them."""
    if not all("pose" in row for row in data.rows):
        return None
    return torch.tensor([row["pose"] for row in data.rows], dtype=torch.float32)


def denoising_figures(
    teacher: Teacher, data: CaptionedImages, images: Tensor, batch: int = 64
) -> dict[str, dict[str, float]]:
    """Errors on images (N, 3, H, W) given their captions; where both know cameras, given a camera too.

    The right camera, and a wrong one: that of another image.
    """
    latents = torch.cat(
        [teacher.encode_images(part.to(teacher.device)).cpu() for part in images.split(batch)]
    )
    text = _encoded(teacher, data.texts, batch)
    poses = poses_of(data)
    conditionings = {"caption": text}
    if poses is not None and teacher.conditioned_on_cameras:
        conditionings["caption_and_camera"] = text.with_extras(**{POSE: poses})
        conditionings["caption_and_wrong_camera"] = text.with_extras(**{POSE: poses.roll(1, 0)})
    figures = {}
    for name, conditioning in conditionings.items():
        errors = denoising_errors(teacher, latents, conditioning, batch)
        levels = {f"{level:g}": error for level, error in errors.by_level.items()}
        figures[name] = {"mean": errors.mean, **levels}
    return figures


def _encoded(teacher: Teacher, captions: Sequence[str], batch: int) -> Conditioning:
    pieces = [captions[first : first + batch] for first in range(0, len(captions), batch)]
    return Conditioning.cat([teacher.encode_text(piece).to("cpu") for piece in pieces])
