"""A student as a diffusers folder: the teacher's text encoder and VAE, the student's U-Net and its
scheduler.
"""

import copy
import shutil
from pathlib import Path

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from safetensors.torch import save_model

from distill.core.noise import NoiseSchedule
from distill.core.teacher import Teacher
from distill.one_step import pipeline as pipeline_file
from distill.one_step.student import Student, spaced_timesteps
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_folder, write_json
from distill.runtime.shipped import names, resolve
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.folder import save_pipeline
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion
from distill.teacher.vocabulary import VOCABULARY

WEIGHTS = "student.safetensors"  # of a student that diffusers has no pipeline for
PIPELINE = "pipeline.py"  # its presence marks a student's folder


def student_scheduler(student: Student) -> LCMScheduler:
    """The stock scheduler with a student's timesteps and fresh noise between them.

    The schedule is truncated above the first timestep, so that stock spacing begins there.
    """
    last = student.timesteps[0]
    return LCMScheduler(
        num_train_timesteps=last + 1,
        trained_betas=student.schedule.betas(last + 1),
        prediction_type=student.denoiser.prediction_type,
        original_inference_steps=len(student.timesteps),
        timestep_scaling=1e9,  # no blending with its input, which consistency models need at t = 0
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # not used by its spacing; the stock pipeline warns at 0
    )


def save_student(folder: Path | str, student: Student, teacher: Teacher) -> None:
    """Write the folder in fp16 safetensors, whole or not at all; an older student there is replaced.

    Of a teacher that is no latent diffusion model only the network's weights are written, in float32.
    Raises `UserError` when the folder holds something other than a student.
    """
    if not isinstance(teacher, LatentDiffusionTeacher):
        with atomic_folder(folder, WEIGHTS, "a student") as temporary:
            temporary.mkdir(parents=True)
            save_model(student.denoiser.network, str(temporary / WEIGHTS))
        return
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(teacher.vae),
        text_encoder=copy.deepcopy(teacher.text_encoder),
        tokenizer=teacher.tokenizer,
        unet=copy.deepcopy(student.denoiser.network),
        scheduler=student_scheduler(student),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with atomic_folder(folder, PIPELINE, "a student") as temporary:
        save_pipeline(temporary, pipeline)
        if teacher.vocabulary is not None:
            write_json(temporary / "tokenizer" / VOCABULARY, sorted(teacher.vocabulary))
        shutil.copyfile(str(pipeline_file.__file__), temporary / PIPELINE)


def load_student(
    name_or_path: Path | str, device: torch.device | str = "cpu"
) -> tuple[Student, LatentDiffusionTeacher]:
    """A student by shipped name or folder, and its text encoder and VAE as a teacher of their own.

    Raises `UserError` where there is none.
    """
    folder = resolve("student", name_or_path)
    if not (folder / PIPELINE).is_file():
        raise UserError(
            f"{name_or_path} is no student: give {names('student')}, "
            "or a folder that distill_one_step.py wrote (outputs/one_step/.../student)"
        )
    parts = load_latent_diffusion(str(folder), device)
    scheduler = LCMScheduler.from_pretrained(folder / "scheduler")
    schedule, config = NoiseSchedule(scheduler.alphas_cumprod), scheduler.config
    timesteps = spaced_timesteps(config.num_train_timesteps, config.original_inference_steps)
    return Student(UNetDenoiser(parts.unet, schedule, config.prediction_type), timesteps), parts
