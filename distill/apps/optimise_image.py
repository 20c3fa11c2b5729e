"""The playground in two dimensions: a few latents or pixel images, driven by any objective; DDS edits one.

The same loop as text-to-3D without the scene, so that what a loss does is seen in a minute.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from distill.objectives.algebra import (
    DistillationOutput,
    PromptConditionings,
    ScoreDistillation,
    text_conditions,
)
from distill.objectives.critic import Critic
from distill.objectives.diagnostics import DiagnosticOptions, look
from distill.objectives.options import ObjectiveOptions
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid
from distill.runtime.run import Run
from distill.teacher.latent import Teacher
from distill.teacher.vocabulary import check_prompt


@dataclass(frozen=True)
class OptimiseImageOptions:
    """What is driven: `particles` latents or images, from noise, from a grey, or from a `source` image, which `source_prompt` describes."""

    prompt: str
    negative_prompt: str = ""
    source: str | None = None
    source_prompt: str = ""
    particles: int = 8
    space: Literal["latent", "pixel"] = "latent"
    start: Literal["noise", "grey", "source"] = "noise"
    learning_rate: float = 0.03
    frames: int = 60  # of the video
    diagnostics: DiagnosticOptions = DiagnosticOptions()

    def __post_init__(self) -> None:
        if min(self.particles, self.frames) < 1 or self.learning_rate <= 0:
            raise UserError("particles and frames must be at least 1 and the learning rate positive")
        if self.start == "source" and self.source is None:
            raise UserError("start=source needs an image: give source=picture.png")


def load_image(path: str, side: int) -> Tensor:
    """An image file as (1, 3, side, side) in [0, 1], on white where it is transparent. Raises `UserError` for what is no image."""
    try:
        with Image.open(Path(path)) as file:
            rgba = np.asarray(file.convert("RGBA"), np.float32) / 255
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): give a PNG or JPEG file") from None
    pixels = torch.from_numpy(rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]).permute(2, 0, 1)[None]
    return F.interpolate(pixels, size=(side, side), mode="area" if pixels.shape[-1] >= side else "bilinear")


class OptimiseImage:
    """Particles, their teacher and their objective; `train` runs the optimisation inside a `Run`."""

    def __init__(
        self, run: Run, teacher: Teacher, objective: ObjectiveOptions, options: OptimiseImageOptions
    ) -> None:
        """Raises `UserError` for prompts the teacher does not know and for an objective that lacks its source."""
        if objective.critic is not None:  # there is no camera here
            objective = replace(objective, critic=replace(objective.critic, camera=False))
        if objective.needs_reference and (options.source is None or not options.source_prompt):
            raise UserError(
                "this objective edits an image: give source=picture.png and source_prompt=what it shows"
            )
        check_prompt(options.prompt, teacher.words)
        self.run, self.teacher, self.options = run, teacher, options
        source = (
            None if options.source is None else load_image(options.source, teacher.resolution).to(run.device)
        )
        self.reference = (
            None
            if source is None
            else teacher.encode_images(source).detach().expand(options.particles, -1, -1, -1)
        )
        self.parameter = self._start(source).requires_grad_()
        self.critic = Critic(teacher, objective.critic) if objective.critic is not None else None
        self.objective = ScoreDistillation(teacher, objective, self.critic, teacher.decode)
        self.conditions = self._conditions(objective)
        self.optimizer = torch.optim.Adam([self.parameter], lr=options.learning_rate, betas=(0.9, 0.99))
        self.frames: list[Tensor] = []

    def _start(self, source: Tensor | None) -> Tensor:
        options, teacher, count = self.options, self.teacher, self.options.particles
        shape = (
            teacher.latent_shape if options.space == "latent" else (3, teacher.resolution, teacher.resolution)
        )
        if options.start == "noise":
            scale = 1.0 if options.space == "latent" else 0.5
            return (scale * torch.randn(count, *shape, generator=self.run.generator)).to(self.run.device)
        grey = torch.full((1, 3, teacher.resolution, teacher.resolution), 0.6, device=self.run.device)
        picture = grey if source is None or options.start == "grey" else source
        value = (
            teacher.encode_images(picture).detach()
            if options.space == "latent"
            else picture.clamp(0.02, 0.98).logit()
        )
        return value.expand(count, -1, -1, -1).clone()

    def _conditions(self, objective: ObjectiveOptions) -> PromptConditionings:
        options = self.options
        prompts = [options.prompt] * options.particles
        conditions = text_conditions(
            self.teacher.encode_text, prompts, objective, options.negative_prompt, options.source_prompt
        )
        if self.critic is None:
            return conditions
        text = self.teacher.encode_text(prompts)
        return PromptConditionings(
            {**conditions.states, "conditional": text, "critic": self.critic.states(text, None)}
        )

    def images(self) -> Tensor:
        """The particles as images (N, 3, H, W) in [0, 1]; differentiable."""
        return (
            self.parameter.sigmoid() if self.options.space == "pixel" else self.teacher.decode(self.parameter)
        )

    def step(self, progress: float) -> DistillationOutput:
        """One update at a share of the run in [0, 1)."""
        pixels = self.options.space == "pixel"
        images = self.images() if pixels or self.objective.options.image else None
        assert images is not None or not pixels
        latents = self.teacher.encode_images(images) if pixels and images is not None else self.parameter
        outcome = self.objective(
            latents, self.conditions, progress, self.run.generator, self.reference, images
        )
        self.optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()
        self.optimizer.step()
        if self.critic is not None:
            self.critic.train_on(latents, self.conditions.states["conditional"], None, self.run.generator)
        return outcome

    def train(self) -> Tensor:
        """Optimise to the end of the run, previews and frames on the way; returns the images (N, 3, H, W) on the CPU."""
        run, options = self.run, self.options
        run.track(particles=_Particles(self.parameter), optimizer=self.optimizer)
        if self.critic is not None:
            run.track(critic=self.critic)
        every = max(run.options.steps // options.frames, 1)
        for step in run.steps():
            outcome = self.step(step / run.options.steps)
            look(run, self.objective, outcome, options.diagnostics)
            run.log(g=outcome.gradient.square().mean().sqrt())
            with torch.no_grad():
                if step % every == 0:
                    self.frames.append(image_grid(self.images().cpu(), min(options.particles, 8)))
                if run.due(run.options.preview_every):
                    run.preview("particles", self.images())
        return self.images().detach().cpu()


class _Particles:
    """A tensor as something a checkpoint can hold."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": self.value.detach()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.value.copy_(state["value"])


def saturation(images: Tensor) -> Tensor:
    """Mean saturation (N,) of images (N, 3, H, W) as in HSV: (max - min) / max of a pixel; guidance drives it up."""
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.clamp_min(1e-6)).mean((1, 2))


def diversity(images: Tensor) -> float:
    """Mean root-mean-square distance between pairs of images (N, 3, H, W): 0 where all are one; 0 for a single image."""
    flat = images.flatten(1)
    return float(torch.pdist(flat).mean() / flat.shape[1] ** 0.5) if len(flat) > 1 else 0.0
