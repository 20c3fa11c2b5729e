"""A student as a diffusers folder: the teacher's text encoder and VAE, the student's U-Net, a scheduler that knows its times."""

import copy
import shutil
from pathlib import Path

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline

from distill.core.noise import NoiseSchedule
from distill.one_step import pipeline as pipeline_file
from distill.one_step.student import Student, spaced_times
from distill.runtime.errors import UserError
from distill.runtime.files import replaced_folder, write_json
from distill.runtime.shipped import known, located
from distill.teacher.folder import save_pipeline
from distill.teacher.latent import Teacher
from distill.teacher.vocabulary import WORDS

PIPELINE = "pipeline.py"  # its presence tells a student's folder from a teacher's


def student_scheduler(student: Student) -> LCMScheduler:
    """The stock scheduler that asks at a student's times and renoises between them.

    The schedule is cut off above the first time, so that stock spacing begins there.
    """
    last = student.times[0]
    return LCMScheduler(
        num_train_timesteps=last + 1,
        trained_betas=student.schedule.betas(last + 1),
        prediction_type=student.prediction_type,
        original_inference_steps=len(student.times),
        timestep_scaling=1e9,  # no blending with its input, which consistency models need at t = 0
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # no part in its spacing; the stock pipeline warns at 0
    )


def save_student(folder: Path | str, student: Student, teacher: Teacher) -> None:
    """Write the folder in fp16 safetensors, whole or not at all; an older student in its place is replaced.

    Raises `UserError` when the folder holds something other than a student.
    """
    made = StableDiffusionPipeline(
        vae=copy.deepcopy(teacher.vae),
        text_encoder=copy.deepcopy(teacher.text_encoder),
        tokenizer=teacher.tokenizer,
        unet=copy.deepcopy(student.unet),
        scheduler=student_scheduler(student),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with replaced_folder(folder, PIPELINE, "a student") as temporary:
        save_pipeline(temporary, made)
        if teacher.words is not None:
            write_json(temporary / "tokenizer" / WORDS, sorted(teacher.words))
        shutil.copyfile(str(pipeline_file.__file__), temporary / PIPELINE)


def load_student(name: Path | str, device: torch.device | str = "cpu") -> tuple[Student, Teacher]:
    """A shipped student or one of a folder and, as a `Teacher` for its text and images, the parts it came with.

    Raises `UserError` where there is none.
    """
    folder = located("student", name)
    if not (folder / PIPELINE).is_file():
        raise UserError(
            f"{name} is no student: give {known('student')}, or a folder that distill_one_step.py wrote (outputs/one_step/.../student)"
        )
    parts = Teacher.load(str(folder), device)
    scheduler = LCMScheduler.from_pretrained(folder / "scheduler")
    steps = scheduler.config.original_inference_steps
    times = spaced_times(scheduler.config.num_train_timesteps, steps)
    return Student(
        parts.unet, NoiseSchedule(scheduler.alphas_cumprod), scheduler.config.prediction_type, times
    ), parts
