"""Prompts to images with any teacher: from noise or from a picture, in part or whole, mixed, swept, ranked, and the denoising as a film."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor
from torch.nn import functional as F

from distill.core.sampling import Callback, Img2ImgInit, sample_ddpm, sample_ode
from distill.core.score import Guided, Prediction, ScoreModel
from distill.data.images import composite_over, open_image
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid
from distill.teacher.clip import caption_features, image_features
from distill.teacher.folder import load_clip
from distill.teacher.latent import Teacher

Sampler = Literal["ddim", "ddpm", "dpm"]


@dataclass(frozen=True)
class TextToImageOptions:
    """`count` images of each prompt; the noise of an image depends on the seed and its place only.

    image: a file to start from, `strength` of the way back to noise; mask: a file, white where it is drawn anew. weights: one an
    prompt, which become one mixed prompt; interpolate: so many mixtures from each prompt to the next. sweep: guidance scales, one
    image each from the same noise. candidates: drawn for each image, the nearest to its prompt under the teacher's CLIP is kept.
    """

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    count: int = 4
    guidance: float = 3.0
    steps: int = 25
    sampler: Sampler = "ddim"
    seed: int = 0
    animation: bool = False
    image: str | None = None
    mask: str | None = None
    strength: float = 0.7
    weights: tuple[float, ...] = ()
    interpolate: int = 0
    sweep: tuple[float, ...] = ()
    candidates: int = 1

    def __post_init__(self) -> None:
        if not self.prompts or min(self.count, self.steps, self.candidates) < 1:
            raise UserError(
                "sampling needs at least one prompt, one image a prompt, one candidate and one step"
            )
        if not all(prompt.strip() for prompt in self.prompts):
            raise UserError("a prompt is empty: say what to draw, for example 'a red teapot'")
        if self.mask is not None and self.image is None:
            raise UserError("a mask says which part of a picture is drawn anew: give image= too")
        if not 0 < self.strength <= 1 or int(self.steps * self.strength) < 1:
            raise UserError(
                f"strength is {self.strength}: a share of the {self.steps} steps in (0, 1] with one step at least is expected"
            )
        if self.weights and (len(self.weights) != len(self.prompts) or sum(self.weights) == 0):
            raise UserError(
                f"{len(self.weights)} weights for {len(self.prompts)} prompts: one each, their sum not 0"
            )
        if self.interpolate and (self.interpolate < 2 or len(self.prompts) < 2 or self.weights):
            raise UserError(
                "interpolate draws at least 2 mixtures between neighbours of at least 2 prompts, which weights would join to one"
            )
        if self.candidates > 1 and (self.weights or self.interpolate or self.sweep or self.animation):
            raise UserError(
                "candidates are ranked by their prompt: leave weights, interpolate, sweep and animation out"
            )


def text_rows(teacher: Teacher, options: TextToImageOptions) -> Tensor:
    """The text states (R, L, D) of the rows to draw: prompts, their one mixture, or the way from each to the next."""
    states = teacher.encode_text(options.prompts)
    if options.weights:
        weights = torch.tensor(options.weights).to(states)
        return torch.einsum("p,pld->ld", weights / weights.sum(), states)[None]
    if options.interpolate:
        shares = torch.linspace(0, 1, options.interpolate).to(states)[:, None, None]
        return torch.cat([torch.lerp(a, b, shares) for a, b in pairwise(states)])
    return states


def load_picture(teacher: Teacher, options: TextToImageOptions, count: int) -> Img2ImgInit | None:
    """What is started from, for `count` images; None where there is no file. Raises `UserError` for files that are no images."""
    if options.image is None:
        return None
    pixels = composite_over(open_image(Path(options.image), teacher.resolution))
    with torch.no_grad():
        clean = teacher.encode_images(pixels.to(teacher.device)).expand(count, -1, -1, -1)
    if options.mask is None:
        return Img2ImgInit(clean, options.strength)
    mask = composite_over(open_image(Path(options.mask), teacher.resolution)).mean(1, keepdim=True)
    side = teacher.latent_shape[1]
    return Img2ImgInit(
        clean, options.strength, (F.interpolate(mask, size=(side, side)) >= 0.5).float().to(teacher.device)
    )


def sample(
    model: ScoreModel,
    teacher: Teacher,
    states: Tensor,
    noise: Tensor,
    options: TextToImageOptions,
    watch: Callback | None = None,
    picture: Img2ImgInit | None = None,
) -> Tensor:
    """Latents by the sampler of the options."""
    config = teacher.scheduler.config
    if options.sampler == "ddpm":
        own = torch.Generator(teacher.device).manual_seed(options.seed)
        return sample_ddpm(
            model, DDPMScheduler.from_config(config), states, noise, options.steps, own, watch, picture
        )
    solver = (
        teacher.scheduler if options.sampler == "ddim" else DPMSolverMultistepScheduler.from_config(config)
    )
    return sample_ode(model, solver, states, noise, options.steps, watch, picture)


def text_to_image(teacher: Teacher, options: TextToImageOptions) -> tuple[Tensor, Tensor | None]:
    """Images (R * count, 3, H, W), row by row, or (R * scales * count, ...) of a sweep; and, for an animation, frames of x0 as grids."""
    generator = torch.Generator().manual_seed(options.seed)
    rows = text_rows(teacher, options).repeat_interleave(options.count * options.candidates, 0)
    noise = torch.randn(len(rows), *teacher.latent_shape, generator=generator).to(teacher.device)
    picture = load_picture(teacher, options, len(rows))
    frames: list[Tensor] = []

    def watch(step: int, prediction: Prediction) -> None:
        if options.animation:
            frames.append(image_grid(teacher.decode(prediction.x0).cpu(), options.count))

    free = teacher.encode_text([options.negative_prompt])
    drawn = []
    for scale in options.sweep or (options.guidance,):
        with torch.no_grad():
            latents = sample(Guided(teacher, free, scale), teacher, rows, noise, options, watch, picture)
            drawn.append(teacher.decode(latents).cpu().unflatten(0, (-1, options.count * options.candidates)))
    images = torch.stack(drawn, 1)  # (R, scales, count * candidates, 3, H, W)
    if options.candidates > 1:
        images = ranked(teacher, images[:, 0], options)
    return images.reshape(-1, *images.shape[-3:]), torch.stack(frames) if frames else None


@torch.no_grad()
def ranked(teacher: Teacher, images: Tensor, options: TextToImageOptions) -> Tensor:
    """Of each prompt's images (P, N, 3, H, W) the `count` nearest to it under CLIP (P, count, ...), the nearest first."""
    clip = load_clip(teacher.place)
    text = caption_features(clip, teacher.tokenizer, options.prompts)
    near = torch.stack([image_features(clip, row) @ words for row, words in zip(images, text, strict=True)])
    best = near.argsort(1, descending=True)[:, : options.count]
    return torch.stack([row[index] for row, index in zip(images, best, strict=True)])


def compare_samplers(
    teacher: Teacher, options: TextToImageOptions, samplers: Sequence[Sampler]
) -> tuple[list[Tensor], str]:
    """The options' images by each sampler from the same noise, and a table of milliseconds an image; each runs once before it is timed."""
    images, lines = [], [f"{'sampler':8} {'steps':>6} {'U-Net calls':>12} {'ms an image':>12}"]
    for name in samplers:
        chosen = replace(options, sampler=name)
        text_to_image(teacher, replace(chosen, steps=min(2, options.steps), strength=1.0))
        begun = time.perf_counter()
        images.append(text_to_image(teacher, chosen)[0])
        spent = 1e3 * (time.perf_counter() - begun) / len(images[-1])
        lines.append(
            f"{name:8} {options.steps:6} {options.steps * (1 if options.guidance == 1 else 2):12} {spent:12.1f}"
        )
    return images, "\n".join(lines)
