"""Images optimised by any objective: a few latents or pixel images as particles; with DDS, an edit of one.

The loop of text-to-3D without the scene, so that the effect of a loss is visible within a minute.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from distill.core.teacher import Teacher
from distill.data.images import load_image
from distill.evaluation.metrics import pixel_diversity, saturation
from distill.objectives.algebra import DistillationOutput, ScoreDistillation
from distill.objectives.critic import Critic
from distill.objectives.diagnostics import DiagnosticOptions, diagnose_run
from distill.objectives.networks import prepare_networks
from distill.objectives.options import ObjectiveOptions
from distill.objectives.prompts import PromptConditionings, encode_prompts
from distill.runtime.checkpoint import TensorState
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid, save_png
from distill.runtime.optim import optimizer_step
from distill.runtime.run import Run
from distill.runtime.video import save_video


@dataclass(frozen=True)
class OptimiseImageOptions:
    """What is optimised, and from which initial value."""

    prompt: str
    negative_prompt: str = ""
    source: str | None = None  # an image file: the initial value with start=source, the reference of an edit
    source_prompt: str = ""  # describes the source, for an edit
    particles: int = 8  # images optimised together
    space: Literal["latent", "pixel"] = "latent"  # of the parameters
    start: Literal["noise", "grey", "source"] = "noise"  # the initial value
    learning_rate: float = 0.03
    frames: int = 60  # of the video
    diagnostics: DiagnosticOptions = DiagnosticOptions()

    def __post_init__(self) -> None:
        if min(self.particles, self.frames) < 1 or self.learning_rate <= 0:
            raise UserError("particles and frames must be at least 1 and the learning rate positive")
        if self.start == "source" and self.source is None:
            raise UserError("start=source needs an image: give source=picture.png")


class OptimiseImage:
    """Particles, their teacher and their objective; `train` runs the optimisation inside a `Run`."""

    def __init__(
        self, run: Run, teacher: Teacher, objective: ObjectiveOptions, options: OptimiseImageOptions
    ) -> None:
        """Raises `UserError` for prompts that the teacher cannot encode and for a missing source."""
        if objective.critic is not None:  # there is no camera here
            objective = replace(objective, critic=replace(objective.critic, camera=False))
        if objective.needs_reference and (options.source is None or not options.source_prompt):
            raise UserError(
                "this objective edits an image: give source=picture.png and source_prompt=its description"
            )
        teacher.check_prompt(options.prompt)
        self.run, self.teacher, self.options = run, teacher, options

        source = self.reference = None
        if options.source is not None:
            source = load_image(options.source, teacher.resolution, background=1.0).to(run.device)
            latents = teacher.encode_images(source).detach()
            self.reference = latents.expand(options.particles, -1, -1, -1)
        self.particles = self._initial_particles(source).requires_grad_()
        self.critic = None if objective.critic is None else Critic(teacher, objective.critic)
        prepare_networks(run, teacher, self.critic)
        self.objective = ScoreDistillation(teacher, objective, self.critic, teacher.decode)
        self.conditionings = self._prompt_conditionings(objective)
        self.optimizer = torch.optim.Adam([self.particles], lr=options.learning_rate, betas=(0.9, 0.99))
        self.frames: list[Tensor] = []

    def _initial_particles(self, source: Tensor | None) -> Tensor:
        """Latents (N, C, h, w), or the logits of pixels (N, 3, H, W)."""
        options, teacher, device = self.options, self.teacher, self.run.device
        latent, side = options.space == "latent", teacher.resolution
        if options.start == "noise":
            shape = teacher.latent_shape if latent else (3, side, side)
            noise = torch.randn(options.particles, *shape, generator=self.run.generator)
            return ((1.0 if latent else 0.5) * noise).to(device)

        image = torch.full((1, 3, side, side), 0.6, device=device)
        if source is not None and options.start == "source":
            image = source
        # clamped, because the logit is infinite at 0 and 1
        initial = teacher.encode_images(image).detach() if latent else image.clamp(0.02, 0.98).logit()
        return initial.expand(options.particles, -1, -1, -1).clone()

    def _prompt_conditionings(self, objective: ObjectiveOptions) -> PromptConditionings:
        options = self.options
        prompts = [options.prompt] * options.particles
        conditionings = encode_prompts(
            self.teacher.encode_text, prompts, objective, options.negative_prompt, options.source_prompt
        )
        if self.critic is None:
            return conditionings
        return conditionings.updated(critic=self.teacher.encode_text(prompts))

    def images(self) -> Tensor:
        """The particles as images (N, 3, H, W) in [0, 1]; differentiable."""
        pixels = self.options.space == "pixel"
        return self.particles.sigmoid() if pixels else self.teacher.decode(self.particles)

    def step(self, progress: float) -> DistillationOutput:
        """One update of the particles, then of the critic, at a fraction of the run in [0, 1)."""
        images, latents = None, self.particles
        if self.options.space == "pixel":
            images = self.images()
            latents = self.teacher.encode_images(images)
        elif self.objective.options.image:  # a residual in pixels
            images = self.images()

        output = self.objective(
            latents, self.conditionings, progress, self.run.generator, self.reference, images
        )
        run = self.run
        optimizer_step(self.optimizer, output.loss, scaler=run.scaler)
        if self.critic is not None:
            conditioning = self.conditionings.by_name["critic"]
            self.critic.train_on(latents, conditioning, run.generator, run.scaler)
        return output

    def train(self) -> Tensor:
        """Optimise to the end of the run, with previews and frames; the images (N, 3, H, W) on the CPU."""
        run, options = self.run, self.options
        run.track(particles=TensorState(self.particles), optimizer=self.optimizer)
        if self.critic is not None:
            run.track(critic=self.critic)
        interval = max(run.options.steps // options.frames, 1)

        for step in run.steps():
            output = self.step(step / run.options.steps)
            diagnose_run(run, self.objective, output, options.diagnostics)
            run.log(g=output.gradient.square().mean().sqrt())
            with torch.no_grad():
                if step % interval == 0:
                    self.frames.append(image_grid(self.images().cpu(), min(options.particles, 8)))
                if run.due(run.options.preview_every):
                    run.preview("particles", self.images())
        return self.images().detach().cpu()


def run_optimise_image(
    run: Run, teacher: Teacher, objective: ObjectiveOptions, options: OptimiseImageOptions
) -> Path:
    """Optimise, write images.png and optimisation.mp4, and return the path of result.json, with figures."""
    task = OptimiseImage(run, teacher, objective, options)
    images = task.train()
    save_png(run.directory / "images.png", image_grid(images, min(len(images), 8)))
    if task.frames:  # none where the run had finished before
        save_video(torch.stack(task.frames), run.directory / "optimisation.mp4", 12)
    figures = {"saturation": float(saturation(images).mean()), "diversity": pixel_diversity(images)}
    return run.finish({**figures, "nfe_per_step": objective.cost()})
