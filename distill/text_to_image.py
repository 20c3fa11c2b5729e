"""Prompts to images with any teacher, and the denoising as a film."""

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from distill.errors import UserError
from distill.report import image_grid
from distill.sampling import sample_ddim, sample_ddpm
from distill.score import Guided, Prediction
from distill.teacher.frozen import Teacher


@dataclass(frozen=True)
class TextToImageOptions:
    """`count` images of each prompt; the noise of an image depends on the seed and its place only."""

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    count: int = 4
    guidance: float = 3.0
    steps: int = 25
    sampler: Literal["ddim", "ddpm"] = "ddim"
    seed: int = 0
    animation: bool = False

    def __post_init__(self) -> None:
        if not self.prompts or min(self.count, self.steps) < 1:
            raise UserError("sampling needs at least one prompt, one image a prompt and one step")
        if not all(prompt.strip() for prompt in self.prompts):
            raise UserError("a prompt is empty: say what to draw, for example 'a red teapot'")


def text_to_image(teacher: Teacher, options: TextToImageOptions) -> tuple[Tensor, Tensor | None]:
    """Images (P * count, 3, H, W), prompt by prompt; and, for an animation, frames (S, 3, H', W') of x0 predictions as grids."""
    generator = torch.Generator().manual_seed(options.seed)
    texts = [prompt for prompt in options.prompts for _ in range(options.count)]
    noise = torch.randn(len(texts), *teacher.latent_shape, generator=generator).to(teacher.device)
    model = Guided(teacher, teacher.encode_text([options.negative_prompt]), options.guidance)
    frames: list[Tensor] = []

    def watch(step: int, prediction: Prediction) -> None:
        if options.animation:
            frames.append(image_grid(teacher.decode(prediction.x0).cpu(), options.count))

    states = teacher.encode_text(texts)
    if options.sampler == "ddim":
        latents = sample_ddim(model, teacher.scheduler, states, noise, options.steps, watch)
    else:
        scheduler = DDPMScheduler.from_config(teacher.scheduler.config)
        own = torch.Generator(teacher.device).manual_seed(options.seed)
        latents = sample_ddpm(model, scheduler, states, noise, options.steps, own, watch)
    return teacher.decode(latents).cpu(), torch.stack(frames) if frames else None
