"""A distillation from its options to its files, for the command line, the timing and Python scripts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from distill.core.teacher import Teacher
from distill.data.latents import LatentCache, load_latents
from distill.evaluation.graders import Graders, load_graders
from distill.evaluation.metrics import moments, saturation
from distill.one_step.folder import save_student
from distill.one_step.methods.base import MethodOptions
from distill.one_step.monitor import Monitor, MonitorOptions
from distill.one_step.student import describe_timestep
from distill.one_step.trainer import OneStep, OneStepOptions
from distill.runtime import processes
from distill.runtime.config import as_mapping
from distill.runtime.errors import UserError
from distill.runtime.experiment import ExperimentInfo
from distill.runtime.machine import pick_device
from distill.runtime.run import Run, RunOptions
from distill.teacher.load import load_teacher


@dataclass(frozen=True, kw_only=True)
class OneStepRecipe:
    """Everything a distillation depends on."""

    teacher: str = (
        "shapes64"  # a shipped name, a diffusers folder, or a hub id of Stable Diffusion 1.x or 2.x
    )
    data: str = "outputs/shapes64"  # captions, and latents where a method needs real data (make_shapes.py)
    judge: str | None = "judge64"  # the monitor's features are the judge's; null: those of `features`
    features: str | None = None  # of the Fréchet distance in place of the judge's: a shipped or hub name
    run: RunOptions
    method: MethodOptions
    distill: OneStepOptions = field(default_factory=OneStepOptions)
    experiment: ExperimentInfo | None = None  # the description of the preset chosen by experiment=NAME

    def __post_init__(self) -> None:
        count = processes.world_size()  # checked here, as the default options are built in any number
        if self.distill.accumulate % count:
            raise UserError(
                f"accumulate is {self.distill.accumulate}: {count} processes need a multiple of their number"
            )


def decoder(teacher: Teacher) -> Callable[[Tensor], Tensor]:
    """Latents (N, C, h, w) to images (N, 3, H, W) on the CPU, in batches, without gradient."""

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return torch.cat([teacher.decode(part.to(teacher.device)).cpu() for part in latents.split(64)])

    return decode


def image_monitor(
    teacher: Teacher, graders: Graders, cache: LatentCache, options: MonitorOptions, count: int = 2000
) -> Monitor:
    """Compares decoded samples, in the graders' features, with `count` decoded real latents."""
    decode = decoder(teacher)
    real = decode(cache.latents[torch.arange(count) * len(cache) // count])
    real_saturation = float(saturation(real).mean())

    def relative_saturation(images: Tensor) -> float:
        return float(saturation(images).mean()) / real_saturation

    return Monitor(moments(graders.features(real)), decode, graders.features, relative_saturation, options)


def build_trainer(recipe: OneStepRecipe) -> OneStep:
    """Load teacher, data and graders, claim the run's directory and build the trainer.

    Raises `UserError` for data, pairs or graders that cannot be used.
    """
    teacher = load_teacher(recipe.teacher, pick_device(recipe.run.device))
    run = Run(recipe.run, as_mapping(recipe), Path(recipe.run.directory).name)
    if run.main:
        print(describe_timestep(teacher.schedule, recipe.distill.student, teacher.denoiser.prediction_type))
    # After the run has seeded the generators: loading a judge draws from them, as the discriminator does.
    graders = load_graders(recipe.teacher, recipe.judge, features=recipe.features)
    cache = load_latents(teacher, recipe.data)
    monitor = image_monitor(teacher, graders, cache, recipe.distill.monitor)
    layers = None if graders.judge is None else graders.judge.layers
    return OneStep(run, teacher, cache, recipe.method, recipe.distill, monitor, decoder(teacher), layers)


def run_one_step(recipe: OneStepRecipe) -> dict[str, float]:
    """Distil, save `student` (averaged weights), `student_raw` and result.json; returns the last metrics."""
    trainer = build_trainer(recipe)
    run, monitor = trainer.run, trainer.monitor
    averaged, raw = trainer.train()
    if run.main:
        save_student(run.directory / "student", averaged, trainer.teacher)
        save_student(run.directory / "student_raw", raw, trainer.teacher)
    metrics = monitor.evaluate(trainer.samples())
    run.finish({**metrics, "warnings": monitor.warnings, "nfe": trainer.nfe, "config": as_mapping(recipe)})
    return metrics
