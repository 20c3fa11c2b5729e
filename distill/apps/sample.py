"""Sampling from its options to image files: by a teacher or a student, with adapters on either."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.apps.text_to_image import Sampler, TextToImageOptions, compare_samplers, text_to_image
from distill.control.adapter import controlled, controlled_student
from distill.control.pictures import ControlPicture, make_control
from distill.one_step.comparison import StudentSampleOptions, sample_student, sheet, table
from distill.one_step.folder import load_student
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid, save_png
from distill.runtime.machine import pick_device
from distill.runtime.video import save_animation
from distill.teacher.latent import load_teacher

TEACHER_OPTIONS = (  # disabled while empty
    "negative_prompt",
    "sweep",
    "compare_samplers",
    "image",
    "mask",
    "weights",
    "interpolate",
    "animation",
)


@dataclass(frozen=True, kw_only=True)
class SampleOptions(TextToImageOptions):
    """Images of prompts from a teacher, or from a student."""

    teacher: str = (
        "shapes64"  # a shipped name, a diffusers folder, or a hub id of Stable Diffusion 1.x or 2.x
    )
    student: str | None = (
        None  # shapes64, or a folder of distill_one_step.py: all its steps, without guidance
    )
    compare: tuple[int, ...] = ()  # with a student: the teacher in so many steps each, [1, 4, 25, 50], timed
    compare_samplers: tuple[Sampler, ...] = ()  # [ddim, ddpm, dpm]: the same images by each, timed
    # adapters: [{adapter: silhouette, picture: outline.png, weight: 1.0, start: 0.0, end: 1.0}]
    controls: tuple[ControlPicture, ...] = ()
    output: str = "outputs/samples"
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in TEACHER_OPTIONS if vars(self)[name]]
        given += ["candidates"] * (self.candidates != 1)
        if self.student is not None and given:
            raise UserError(
                f"{', '.join(given)}: a student samples from noise and a prompt in one pass; leave student= out "
                "for the teacher to do it"
            )


def run_sample(options: SampleOptions) -> Path:
    """Sample, print tables of times where something is compared, and write samples.png and an image each."""
    sample = sample_with_teacher if options.student is None else sample_with_student
    folder = Path(options.output)
    grid, images, columns = sample(options)
    save_png(folder / "samples.png", grid)
    for index, image in enumerate(images):
        save_png(folder / f"{index // columns:03d}_{index % columns:02d}.png", image)
    return folder / "samples.png"


def sample_with_teacher(options: SampleOptions) -> tuple[Tensor, Tensor, int]:
    """A grid (3, H', W'), its images (N, 3, H, W) and its columns; an animation goes to the output folder."""
    teacher = load_teacher(options.teacher, pick_device(options.device))
    controls = [make_control(control, teacher) for control in options.controls]
    model = controlled(teacher, controls) if controls else teacher
    columns = options.count * max(len(options.sweep), 1)
    if options.compare_samplers:
        rows, times = compare_samplers(model, options, options.compare_samplers)
        print(times)
        return image_grid(torch.cat(rows), columns), torch.cat(rows), columns
    images, frames = text_to_image(model, options)
    if frames is not None:
        save_animation(frames, Path(options.output) / "denoising.gif", 8)
    return image_grid(images, columns), images, columns


def sample_with_student(options: SampleOptions) -> tuple[Tensor, Tensor, int]:
    """As `sample_with_teacher`, by the student; the grid also shows the teacher where both are compared."""
    device = pick_device(options.device)
    student, parts = load_student(str(options.student), device)
    controls = [make_control(control, parts) for control in options.controls]
    student = controlled_student(student, controls) if controls else student
    chosen = StudentSampleOptions(
        options.prompts, options.count, options.seed, options.compare, options.guidance
    )
    teacher = load_teacher(options.teacher, device) if options.compare else None
    rows = sample_student(student, parts, teacher, chosen)
    if options.compare:
        print(table(rows))
    return sheet(rows, chosen), rows[0].images, options.count
