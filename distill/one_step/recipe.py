"""A distillation from its options to its files, for the command line, the timing and Python scripts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from distill.core.teacher import Teacher
from distill.data.latents import load_latents
from distill.data.prompts import PromptData, load_prompts
from distill.evaluation.graders import Graders, load_graders
from distill.evaluation.metrics import moments
from distill.one_step.folder import save_student
from distill.one_step.methods.base import MethodOptions
from distill.one_step.monitor import Monitor, MonitorOptions, grade_in_chunks
from distill.one_step.student import describe_timestep
from distill.one_step.trainer import SAMPLE_BATCH, OneStep, OneStepOptions
from distill.runtime import processes
from distill.runtime.config import as_mapping
from distill.runtime.errors import UserError
from distill.runtime.experiment import ExperimentInfo
from distill.runtime.precision import pick_precision
from distill.runtime.run import Run, RunOptions
from distill.runtime.transfer import upload
from distill.teacher.load import load_teacher


@dataclass(frozen=True, kw_only=True)
class OneStepRecipe:
    """Everything a distillation depends on."""

    teacher: str = "shapes64"  # a shipped name, a diffusers folder, a hub id, or a YAML file
    # A captioned image folder (make_shapes.py), or a text file, a caption a line, where no image is needed.
    data: str = "outputs/shapes64"
    # Encode the captions of each batch anew, not all once: of 100,000 the embeddings fill 12 GB.
    stream_captions: bool = False
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


def decoder(teacher: Teacher, batch: int = SAMPLE_BATCH) -> Callable[[Tensor], Tensor]:
    """Latents (N, C, h, w) to images (N, 3, H, W) on the CPU, in batches, without gradient."""

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        parts = latents.split(batch)
        return torch.cat([teacher.decode(upload(part, teacher.device)).cpu() for part in parts])

    return decode


def image_monitor(
    decode: Callable[[Tensor], Tensor], graders: Graders, data: PromptData, options: MonitorOptions
) -> Monitor:
    """Compares decoded samples, in the graders' features, with decoded real latents."""
    grade = grade_in_chunks(decode, graders.features, options.chunk)
    features, saturations = grade(data.latents_of(torch.arange(options.real) * len(data) // options.real))
    return Monitor(moments(features), float(saturations.mean()), grade, options)


def load_data(recipe: OneStepRecipe, teacher: Teacher) -> PromptData:
    """The captions, and latents where the method or the monitor needs them; encoded once, by one process."""
    images = recipe.method.needs_real or recipe.distill.monitor.every > 0
    with processes.main_first():
        if recipe.stream_captions or Path(recipe.data).suffix == ".txt":
            return load_prompts(teacher, recipe.data, images)
        return load_latents(teacher, recipe.data)


def build_trainer(recipe: OneStepRecipe) -> OneStep:
    """Load teacher, data and graders, claim the run's directory and build the trainer.

    Raises `UserError` for data, pairs or graders that cannot be used.
    """
    precision = pick_precision(recipe.run.device, recipe.run.precision)
    teacher = load_teacher(recipe.teacher, precision.device, precision.dtype)
    run = Run(recipe.run, as_mapping(recipe), Path(recipe.run.directory).name)
    if run.main:
        print(describe_timestep(teacher.schedule, recipe.distill.student, teacher.denoiser.prediction_type))
    # After the run has seeded the generators: loading a judge draws from them, as the discriminator does.
    graders = load_graders(recipe.teacher, recipe.judge, features=recipe.features, device=precision.device)
    data, options = load_data(recipe, teacher), recipe.distill.monitor
    decode = decoder(teacher, min(options.chunk or SAMPLE_BATCH, SAMPLE_BATCH))
    monitor = None
    if options.every:
        _check_judge(recipe, graders, teacher)
        monitor = image_monitor(decode, graders, data, options)
    layers = None if graders.judge is None else graders.judge.layers
    return OneStep(run, teacher, data, recipe.method, recipe.distill, monitor, decode, layers)


def _check_judge(recipe: OneStepRecipe, graders: Graders, teacher: Teacher) -> None:
    judge = graders.judge
    if recipe.features is None and judge is not None and judge.resolution != teacher.resolution:
        raise UserError(
            f"the judge {recipe.judge} knows images of {judge.resolution} pixels and the teacher's have "
            f"{teacher.resolution}: give judge=null features=facebook/dinov2-base (or a CLIP), "
            "or distill.monitor.every=0"
        )


def run_one_step(recipe: OneStepRecipe) -> dict[str, float]:
    """Distil, save `student` (averaged weights), `student_raw` and result.json; returns the last metrics.

    `student_raw` is left out where no average is kept, the metrics where there is no monitor.
    """
    trainer = build_trainer(recipe)
    run, monitor = trainer.run, trainer.monitor
    averaged, raw = trainer.train()
    if run.main:
        save_student(run.directory / "student", averaged, trainer.teacher)
        if raw is not averaged:
            save_student(run.directory / "student_raw", raw, trainer.teacher)
    metrics = {} if monitor is None else monitor.evaluate(trainer.samples())
    warnings = [] if monitor is None else monitor.warnings
    run.finish({**metrics, "warnings": warnings, "nfe": trainer.nfe, "config": as_mapping(recipe)})
    return metrics
