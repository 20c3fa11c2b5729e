"""Adapters graded: samples of held-out conditions against those conditions and their captions, with control and without."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from distill.control.adapter import Control, controlled, controlled_student
from distill.control.conditions import as_input
from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.data.folders import CaptionedImages
from distill.evaluation.fidelity import fidelity, means
from distill.evaluation.judge import Judge
from distill.evaluation.probe import Probe
from distill.evaluation.teacher import graded
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.teacher.latent import Teacher

Draw = Callable[[list[Control], Tensor, Tensor], Tensor]  # controls, text states, noise to latents


@dataclass(frozen=True)
class ControlEvaluationOptions:
    """`samples` of a test split, drawn in `steps` DDIM steps with guidance; the adapter's weight."""

    samples: int = 300
    steps: int = 25
    guidance: float = 2.0
    weight: float = 1.0
    batch: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.samples, self.steps, self.batch) < 1:
            raise UserError("samples, steps and batch must be at least 1")


def teacher_sampler(teacher: Teacher, options: ControlEvaluationOptions) -> Draw:
    """DDIM with guidance."""

    def draw(controls: list[Control], states: Tensor, noise: Tensor) -> Tensor:
        model = Guided(controlled(teacher, controls), teacher.encode_text([""]), options.guidance)
        return sample_ode(model, teacher.scheduler, states, noise, options.steps)

    return draw


def by_student(student: Student, options: ControlEvaluationOptions) -> Draw:
    """All of a student's steps."""
    generator = torch.Generator().manual_seed(options.seed)
    return lambda controls, states, noise: controlled_student(student, controls)(noise, states, generator)


@torch.no_grad()
def images_of(
    draw: Draw,
    teacher: Teacher,
    adapter: ControlNetModel | None,
    texts: list[str],
    pictures: Tensor,
    options: ControlEvaluationOptions,
) -> Tensor:
    """Images (N, 3, H, W) on the CPU of captions and uint8 pictures; without an adapter the same noise, uncontrolled."""
    noise = torch.randn(
        len(texts), *teacher.latent_shape, generator=torch.Generator().manual_seed(options.seed)
    )
    made = []
    for part in torch.arange(len(texts)).split(options.batch):
        shown = as_input(pictures[part]).to(teacher.device)
        controls = [] if adapter is None else [Control(adapter, shown, options.weight)]
        latents = draw(
            controls, teacher.encode_text([texts[i] for i in part]), noise[part].to(teacher.device)
        )
        made.append(teacher.decode(latents).cpu())
    return torch.cat(made)


def evaluate_control(
    teacher: Teacher,
    student: Student | None,
    adapter: ControlNetModel,
    condition: str,
    data: CaptionedImages,
    pictures: Tensor,
    readers: tuple[Probe, Judge],
    options: ControlEvaluationOptions,
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """A row of figures for the true images, and for teacher and student without and with the adapter; and their images.

    Fidelities are of all samples and of those of a single object; the judge tells single objects only.
    """
    probe, judge = readers
    data, pictures = data.select(range(min(options.samples, len(data)))), pictures[: options.samples]
    single = [i for i, row in enumerate(data.rows) if not row.get("relation")]
    draws = {"teacher": teacher_sampler(teacher, options)} | (
        {} if student is None else {"student": by_student(student, options)}
    )
    images = {"true images": data.composite(slice(None))}
    for name, draw in draws.items():
        for kind, net in ((name, None), (f"{name}, adapter", adapter)):
            images[kind] = images_of(draw, teacher, net, data.texts, pictures, options)
    rows = []
    for name, made in images.items():
        told = graded(judge, made[single], [data.rows[i] for i in single])
        figures = fidelity(condition, made, pictures, probe)
        alone = {f"{key}_single": values[single] for key, values in figures.items()}
        rows.append(
            {
                "generator": name,
                **means(figures | alone),
                **{key: told[key] for key in ("object", "colour", "object_and_colour", "view")},
            }
        )
    return rows, list(images.values())
