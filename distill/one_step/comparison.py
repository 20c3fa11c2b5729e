"""A student beside its teacher at several numbers of steps, from the same noise, with times."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.evaluation.generator import Generator, draw, student_generator, teacher_generator
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid
from distill.teacher.latent import Teacher

TIMED = 0.5  # seconds of U-Net calls that a time is the mean of, at least


@dataclass(frozen=True)
class StudentSampleOptions:
    """`count` images of each prompt from a student; beside its teacher at each of `compare` steps, with guidance."""

    prompts: tuple[str, ...]
    count: int = 4
    seed: int = 0
    compare: tuple[int, ...] = ()
    guidance: float = 3.0

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise UserError(
                "sampling needs at least one prompt, and none that is empty: say what to draw, for example 'a red teapot'"
            )
        if self.count < 1 or any(steps < 1 for steps in self.compare):
            raise UserError("count and the steps to compare with must be at least 1")


@dataclass(frozen=True)
class Row:
    """One generator's images (P * count, 3, H, W), prompt by prompt, and its seconds an image: U-Net, and with the decoder."""

    name: str
    images: Tensor
    unet_seconds: float
    seconds: float


def sample_student(
    student: Student, parts: Teacher, teacher: Teacher | None, options: StudentSampleOptions
) -> list[Row]:
    """The student's row, then one a number of the teacher's steps; each drawn once before it is timed, over half a second at least."""
    generators = [student_generator("student", student)]
    if options.compare and teacher is None:
        raise UserError("compare needs the teacher: give teacher=")
    if teacher is not None:
        generators += [teacher_generator(teacher, steps, options.guidance) for steps in options.compare]
    return [
        _row(generator, parts if index == 0 or teacher is None else teacher, options)
        for index, generator in enumerate(generators)
    ]


def _row(generator: Generator, teacher: Teacher, options: StudentSampleOptions) -> Row:
    texts = [prompt for prompt in options.prompts for _ in range(options.count)]
    runs = [
        draw(generator, teacher, texts, len(texts), options.seed)
    ]  # not timed: text states, and kernels for these shapes, are made
    while options.compare and sum(run.unet_seconds for run in runs[1:]) < TIMED:
        runs.append(draw(generator, teacher, texts, len(texts), options.seed))
    count = len(texts) * max(len(runs) - 1, 1)
    unet, decoder = (
        sum(run.unet_seconds for run in runs[1:]) / count,
        sum(run.decoder_seconds for run in runs[1:]) / count,
    )
    return Row(generator.name, runs[0].images, unet, unet + decoder)


def sheet(rows: Sequence[Row], options: StudentSampleOptions) -> Tensor:
    """A picture (3, H', W'): prompts down and noises across; with something to compare, a generator a line."""
    if len(rows) == 1:
        return image_grid(rows[0].images, options.count)
    return image_grid(torch.cat([row.images for row in rows]), len(rows[0].images))


def table(rows: Sequence[Row]) -> str:
    """Milliseconds an image and how many times the student's."""
    first = rows[0]
    lines = [f"{'':32} {'U-Net ms':>9} {'ratio':>6} {'all ms':>8} {'ratio':>6}"]
    for row in rows:
        ratios = row.unet_seconds / first.unet_seconds, row.seconds / first.seconds
        lines.append(
            f"{row.name:32} {1e3 * row.unet_seconds:9.2f} {ratios[0]:6.1f} {1e3 * row.seconds:8.2f} {ratios[1]:6.1f}"
        )
    return "\n".join(lines)
