"""A student and its teacher at several numbers of steps, from the same noise, with times."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.teacher import Teacher
from distill.evaluation.generate import Sampler, generate, student_sampler, teacher_sampler
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid

MIN_SECONDS = 0.5  # of U-Net calls, at least, that a time is the mean of


@dataclass(frozen=True)
class StudentSampleOptions:
    """`count` images of each prompt from a student, and from its teacher at each of `compare` steps."""

    prompts: tuple[str, ...]
    count: int = 4
    seed: int = 0
    compare: tuple[int, ...] = ()
    guidance: float = 3.0  # the teacher's CFG scale

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise UserError("sampling needs prompts, none of them empty: give for example 'a red teapot'")
        if self.count < 1 or any(steps < 1 for steps in self.compare):
            raise UserError("count and the steps to compare with must be at least 1")


@dataclass(frozen=True)
class Row:
    """One sampler's images (P * count, 3, H, W), prompt by prompt, and seconds an image: U-Net, and with
    the decoder.
    """

    name: str
    images: Tensor
    unet_seconds: float
    seconds: float


def sample_student(
    student: Student, parts: Teacher, teacher: Teacher | None, options: StudentSampleOptions
) -> list[Row]:
    """The student's row, then one for each number of the teacher's steps; warmed up before they are timed.

    Raises `UserError` where there is no teacher to compare with.
    """
    if options.compare and teacher is None:
        raise UserError("compare needs the teacher: give teacher=")
    rows = [_row(student_sampler("student", student), parts, options)]
    if teacher is not None:
        samplers = [teacher_sampler(teacher, steps, options.guidance) for steps in options.compare]
        rows += [_row(sampler, teacher, options) for sampler in samplers]
    return rows


def _row(sampler: Sampler, teacher: Teacher, options: StudentSampleOptions) -> Row:
    captions = [prompt for prompt in options.prompts for _ in range(options.count)]
    # The first run is not timed: it encodes the prompts and picks kernels for these shapes.
    first = generate(teacher, captions, sampler, len(captions), options.seed)
    unet_seconds, decoder_seconds, runs = 0.0, 0.0, 0
    while options.compare and unet_seconds < MIN_SECONDS:
        samples = generate(teacher, captions, sampler, len(captions), options.seed)
        unet_seconds, runs = unet_seconds + samples.unet_seconds, runs + 1
        decoder_seconds += samples.decoder_seconds
    count = len(captions) * max(runs, 1)
    return Row(sampler.name, first.images, unet_seconds / count, (unet_seconds + decoder_seconds) / count)


def comparison_grid(rows: Sequence[Row], options: StudentSampleOptions) -> Tensor:
    """One image (3, H', W'): prompts down and seeds across; where samplers are compared, a sampler a line."""
    if len(rows) == 1:
        return image_grid(rows[0].images, options.count)
    return image_grid(torch.cat([row.images for row in rows]), len(rows[0].images))


def timing_table(rows: Sequence[Row]) -> str:
    """Milliseconds an image, and their ratio to the student's."""
    first = rows[0]
    lines = [f"{'':32} {'U-Net ms':>9} {'ratio':>6} {'all ms':>8} {'ratio':>6}"]
    for row in rows:
        unet = f"{1e3 * row.unet_seconds:9.2f} {row.unet_seconds / first.unet_seconds:6.1f}"
        lines.append(f"{row.name:32} {unet} {1e3 * row.seconds:8.2f} {row.seconds / first.seconds:6.1f}")
    return "\n".join(lines)
