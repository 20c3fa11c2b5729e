"""Sampling from its options to image files: by a teacher or a student, with adapters on either."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.apps.comparisons import compare_formulations, compare_samplers
from distill.apps.text_to_image import TextToImageOptions, text_to_image
from distill.control.adapter import ControlOptions, controlled, controlled_student
from distill.core.samplers import parse_sampler
from distill.core.sampling import Formulation
from distill.one_step.comparison import StudentSampleOptions, comparison_grid, sample_student, timing_table
from distill.one_step.folder import load_student
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid, save_png
from distill.runtime.precision import PrecisionName, pick_precision
from distill.runtime.video import save_animation
from distill.teacher.load import load_teacher
from distill.upscaler.network import load_upscaler, upscale

TEACHER_OPTIONS = (  # disabled while empty
    "negative_prompt",
    "resolution",
    "sweep",
    "compare_samplers",
    "formulations",
    "image",
    "mask",
    "weights",
    "interpolate",
    "animation",
    "azimuths",
)
NOISE_ONLY = ("compare_samplers", "sweep", "image", "animation")  # not combined with formulations


@dataclass(frozen=True, kw_only=True)
class SampleOptions(TextToImageOptions):
    """Images of prompts from a teacher, or from a student."""

    # a shipped name, a diffusers folder, a hub id, or a YAML file
    teacher: str = "shapes64"
    autoencoder: str | None = None  # a tiny one in place of the VAE: a folder, madebyollin/taesd
    student: str | None = None  # shapes64, or a folder of distill_one_step.py: all its steps
    student_guidance: float | None = None  # of a student whose input it is (LCM); null: the student's own
    compare: tuple[int, ...] = ()  # with a student: the teacher in so many steps each, [1, 4, 25, 50], timed
    # the same images by each sampler, timed: [ddim, dpm], or each in steps of its own, [ddim:25, ddpm:500]
    compare_samplers: tuple[str, ...] = ()
    # the same images by Heun's method in each formulation of the ODE, [vp, ve, flow], and their differences
    formulations: tuple[Formulation, ...] = ()
    # adapters: [{adapter: silhouette, image: outline.png, weight: 1.0, start: 0.0, end: 1.0}]
    controls: tuple[ControlOptions, ...] = ()
    upscale: int | None = None  # also write the images so many pixels a side, by the upscaler
    upscaler: str = "renders512"  # a shipped name, or a folder of train_upscaler.py
    output: str = "outputs/samples"
    device: str = "auto"  # auto: cuda when there is one
    precision: PrecisionName = "auto"  # of the networks; auto: bfloat16 on CUDA, float32 on a CPU

    def __post_init__(self) -> None:
        super().__post_init__()
        for sampler in self.compare_samplers:
            parse_sampler(sampler, self.steps)
        multiple = ["candidates"] * (self.candidates != 1)
        conflicts = [name for name in TEACHER_OPTIONS if vars(self)[name]] + multiple
        if self.student is not None and conflicts:
            raise UserError(
                f"{', '.join(conflicts)}: a student generates from noise and a prompt only; "
                "leave student= out for the teacher to do it"
            )
        if self.controls and self.resolution is not None:
            raise UserError(
                f"resolution={self.resolution}: adapters read images of the teacher's own; leave it or the "
                "controls out"
            )
        if self.student is None and self.student_guidance is not None:
            raise UserError("student_guidance is of a student: give student=, or guidance= for the teacher")
        conflicts = [name for name in NOISE_ONLY if vars(self)[name]] + multiple
        if self.formulations and conflicts:
            raise UserError(f"{', '.join(conflicts)}: not available with formulations; leave one of them out")


def run_sample(options: SampleOptions) -> Path:
    """Sample, print the tables of comparisons, and write samples.png and a file for each image.

    With `upscale` also upscaled.png, and the large images in upscaled/.
    """
    sample = sample_with_teacher if options.student is None else sample_with_student
    folder = Path(options.output)
    upscaler = None
    if options.upscale is not None:  # a mistake in its name is reported before the sampling
        upscaler = load_upscaler(options.upscaler, pick_precision(options.device, "float32").device)
    grid, images, columns = sample(options)
    save_png(folder / "samples.png", grid)
    _save_images(folder, images, columns)
    if upscaler is not None and options.upscale is not None:
        large = upscale(upscaler, images, options.upscale)
        save_png(folder / "upscaled.png", image_grid(large, columns))
        _save_images(folder / "upscaled", large, columns)
    return folder / "samples.png"


def _save_images(folder: Path, images: Tensor, columns: int) -> None:
    for index, image in enumerate(images):
        save_png(folder / f"{index // columns:03d}_{index % columns:02d}.png", image)


def sample_with_teacher(options: SampleOptions) -> tuple[Tensor, Tensor, int]:
    """A grid (3, H', W'), its images (N, 3, H, W) and its columns; animations go to the output folder."""
    precision = pick_precision(options.device, options.precision)
    teacher = load_teacher(options.teacher, precision.device, precision.dtype, options.autoencoder)
    controls = [control.build(teacher) for control in options.controls]
    model = controlled(teacher, controls) if controls else teacher
    columns = options.images_per_prompt * max(len(options.sweep), 1)
    if options.compare_samplers or options.formulations:
        if options.formulations:
            rows, table = compare_formulations(model, options, options.formulations)
        else:
            rows, table = compare_samplers(model, options, options.compare_samplers)
        print(table)
        return image_grid(torch.cat(rows), columns), torch.cat(rows), columns

    images, frames = text_to_image(model, options)
    for name, grids in frames.items():
        save_animation(grids, Path(options.output) / f"denoising_{name}.gif", 8)
    return image_grid(images, columns), images, columns


def sample_with_student(options: SampleOptions) -> tuple[Tensor, Tensor, int]:
    """As `sample_with_teacher`, by the student; the grid also shows the teacher where they are compared."""
    precision = pick_precision(options.device, options.precision)
    device, dtype = precision.device, precision.dtype
    teacher = None
    if options.compare:
        teacher = load_teacher(options.teacher, device, dtype, options.autoencoder)
    student, parts = load_student(str(options.student), device, dtype, teacher, options.autoencoder)
    if options.student_guidance is not None and student.guidance is None:
        raise UserError(
            f"student_guidance is {options.student_guidance:g}, but {options.student} was trained at one "
            "scale, which is not an input: leave it out"
        )
    student = student.with_denoiser(student.denoiser, options.student_guidance)
    controls = [control.build(parts) for control in options.controls]
    student = controlled_student(student, controls) if controls else student
    chosen = StudentSampleOptions(
        options.prompts, options.count, options.seed, options.compare, options.guidance
    )
    rows = sample_student(student, parts, teacher, chosen)
    if options.compare:
        print(timing_table(rows))
    return comparison_grid(rows, chosen), rows[0].images, options.count
