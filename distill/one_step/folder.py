"""A student as a diffusers folder: the teacher's text encoder and VAE, the student's U-Net and its
scheduler.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from distill.core.identity import TeacherIdentity, check_teacher, recorded_teacher, teacher_record
from distill.core.noise import NoiseSchedule
from distill.core.teacher import Teacher
from distill.one_step import pipeline as pipeline_file
from distill.one_step.student import Student, spaced_timesteps
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_folder, read_json, write_json
from distill.runtime.shipped import names, resolve
from distill.teacher.denoiser import DiffusersDenoiser, UNetDenoiser
from distill.teacher.families import load_diffusers
from distill.teacher.folder import original_parts, save_pipeline
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion
from distill.teacher.multi_view import MultiViewUNet
from distill.teacher.tiny_autoencoder import with_autoencoder
from distill.teacher.vocabulary import VOCABULARY

WEIGHTS = "student.safetensors"  # of a student that diffusers has no pipeline for
PIPELINE = "pipeline.py"  # its presence marks a student's folder with a pipeline
FACTS = "student.json"  # its teacher; of a student that allows a choice of them, steps and guidance scale
TEACHERS_PARTS = ("vae", "text_encoder", "tokenizer")  # which a folder that is not whole lacks
NO_BLENDING = 1e9  # a timestep_scaling at which c_skip is 0 and c_out 1


def student_scheduler(student: Student) -> LCMScheduler:
    """The stock scheduler with a student's timesteps and fresh noise between them.

    The schedule is truncated above the first timestep, so that stock spacing begins there.
    """
    last = student.timesteps[0]
    return LCMScheduler(
        num_train_timesteps=last + 1,
        trained_betas=student.schedule.betas(last + 1),
        prediction_type=student.denoiser.prediction_type,
        original_inference_steps=student.grid or len(student.timesteps),
        # without one no blending with its input, which consistency models need at t = 0
        timestep_scaling=NO_BLENDING if student.timestep_scaling is None else student.timestep_scaling,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # not used by its spacing; the stock pipeline warns at 0
    )


def save_student(folder: Path | str, student: Student, teacher: Teacher, whole: bool = True) -> None:
    """Write the folder in fp16 safetensors, all of it or nothing; an older student there is replaced.

    The teacher's VAE and text encoder keep every bit: they are float32 where fp16 would round them. With
    `whole` false they are left out, and loaded from the teacher by the name that is recorded; stock diffusers
    needs a whole folder. A student is conditioned on text: of a multi-view U-Net the view conditions are left
    out. Of a flow, and of a teacher of another family, only the network's weights are written, in float32,
    and what else the student is; its teacher is needed to use it.
    Raises `UserError` when the folder holds something other than a student.
    """
    is_flow = student.denoiser.prediction_type == "flow_prediction"  # LCMScheduler has none
    if not isinstance(teacher, LatentDiffusionTeacher) or is_flow:
        with atomic_folder(folder, WEIGHTS, "a student") as temporary:
            temporary.mkdir(parents=True)
            save_model(student.denoiser.network, str(temporary / WEIGHTS))
            facts = teacher_record(teacher.identity) | {
                "timesteps": list(student.timesteps),
                "grid": student.grid,
                "timestep_scaling": student.timestep_scaling,
                "guidance": student.guidance,
                "prediction_type": student.denoiser.prediction_type,
                "time_features": student.denoiser.network.config.get("time_cond_proj_dim"),
            }
            write_json(temporary / FACTS, facts)
        return
    text_encoder, vae = original_parts(teacher)
    network = student.denoiser.network
    unet = network.stock() if isinstance(network, MultiViewUNet) else copy.deepcopy(network)
    if student.guidance is None and unet.config.time_cond_proj_dim is not None:
        # The start of an interval, 0 when it samples, which is the same as none.
        unet.time_embedding.cond_proj = None
        unet.register_to_config(time_cond_proj_dim=None)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=teacher.tokenizer,
        unet=unet,
        scheduler=student_scheduler(student),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with atomic_folder(folder, PIPELINE, "a student") as temporary:
        save_pipeline(temporary, pipeline, exact=("vae", "text_encoder"))
        if teacher.vocabulary is not None:
            write_json(temporary / "tokenizer" / VOCABULARY, sorted(teacher.vocabulary))
        facts = teacher_record(teacher.identity)
        if student.grid is not None or student.guidance is not None:
            facts |= {"steps": len(student.timesteps), "guidance": student.guidance}
        write_json(temporary / FACTS, facts)
        for part in () if whole else TEACHERS_PARTS:
            shutil.rmtree(temporary / part)
        if not whole:
            (temporary / "model_index.json").unlink()
        shutil.copyfile(str(pipeline_file.__file__), temporary / PIPELINE)


def load_student(
    name_or_path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    teacher: Teacher | None = None,
    autoencoder: str | None = None,
) -> tuple[Student, Teacher]:
    """A student by shipped name or folder, and its text encoder and VAE as a teacher of their own.

    Of a student of another family than Stable Diffusion's, the latter is its teacher itself.

    `dtype` is that of their weights, by default the device's. The parts have the identity of the student's
    teacher, whose adapters they take. teacher: the one that the student is used with, where there is one.
    autoencoder: a tiny one in place of the VAE (`load_tiny_autoencoder`).
    Raises `UserError` where there is no student, and for one that belongs to another teacher.
    """
    folder = resolve("student", name_or_path)
    if (folder / WEIGHTS).is_file():
        return _load_network(folder, device, dtype, teacher, autoencoder)
    if not (folder / PIPELINE).is_file():
        raise UserError(
            f"{name_or_path} is no student: give {names('student')}, "
            "or a folder that distill_one_step.py wrote (outputs/one_step/.../student)"
        )
    path = folder / FACTS
    facts = read_json(path) if path.is_file() else {}
    owner = recorded_teacher(facts, str(path))
    if teacher is not None:
        remedy = "distil one (scripts/distill_one_step.py)"
        check_teacher(f"student {name_or_path}", owner, teacher.identity, remedy)
    parts = _load_parts(folder, owner, device, dtype)
    parts.identity = owner
    parts = with_autoencoder(parts, autoencoder)
    scheduler = LCMScheduler.from_pretrained(folder / "scheduler")
    schedule, config = NoiseSchedule(scheduler.alphas_cumprod), scheduler.config
    denoiser = UNetDenoiser(parts.unet, schedule, config.prediction_type)
    scaling = None if config.timestep_scaling == NO_BLENDING else config.timestep_scaling
    if "steps" not in facts:
        timesteps = spaced_timesteps(config.num_train_timesteps, config.original_inference_steps)
        return Student(denoiser, timesteps, timestep_scaling=scaling), parts
    grid = config.original_inference_steps
    timesteps = spaced_timesteps(config.num_train_timesteps, facts["steps"], grid)
    return Student(denoiser, timesteps, grid, scaling, facts["guidance"]), parts


def _load_network(
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype | None,
    teacher: Teacher | None,
    autoencoder: str | None,
) -> tuple[Student, Teacher]:
    """A student that is its network's weights alone, and its teacher, by the name that is recorded."""
    path = folder / FACTS
    facts = read_json(path) if path.is_file() else {}
    owner = recorded_teacher(facts, str(path))
    if teacher is None:
        if owner is None:
            raise UserError(f"{path} names no teacher, which the student {folder} needs: give teacher=")
        loaded = load_diffusers(str(resolve("teacher", owner.name)), device, dtype)
        teacher = with_autoencoder(loaded, autoencoder)
    remedy = "distil one (scripts/distill_one_step.py)"
    check_teacher(f"student {folder}", owner, teacher.identity, remedy)
    copied = teacher.trainable_copy()
    assert isinstance(copied, DiffusersDenoiser)
    try:
        if facts["time_features"] is not None:
            copied.with_guidance_embedding(facts["time_features"])
        load_model(copied.network, str(folder / WEIGHTS))
        denoiser = type(copied)(copied.network, copied.schedule, facts["prediction_type"])
        timesteps, scaling = tuple(facts["timesteps"]), facts["timestep_scaling"]
        student = Student(denoiser, timesteps, facts["grid"], scaling, facts["guidance"])
    except (KeyError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"the student in {folder} is damaged ({reason}): distil it again") from None
    return student.to(teacher.precision.dtype).eval().requires_grad_(False), teacher


def _load_parts(
    folder: Path, owner: TeacherIdentity | None, device: torch.device | str, dtype: torch.dtype | None
) -> LatentDiffusionTeacher:
    """A student's folder as a teacher; what a folder that is not whole lacks is the recorded teacher's."""
    if (folder / TEACHERS_PARTS[0]).is_dir():
        return load_latent_diffusion(str(folder), device, dtype)
    if owner is None:
        raise UserError(f"the student {folder} lacks {', '.join(TEACHERS_PARTS)}: copy the whole folder")
    teacher = load_latent_diffusion(owner.name, device, dtype)
    remedy = "save the student whole, where that teacher is (scripts/save_student.py)"
    check_teacher(f"student {folder}", owner, teacher.identity, remedy)
    unet: Any = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=teacher.unet.dtype)
    parts = {
        "tokenizer": teacher.tokenizer,
        "text_encoder": teacher.text_encoder,
        "vae": teacher.vae,
        "unet": unet.to(device),
        "scheduler": LCMScheduler.from_pretrained(folder / "scheduler"),
    }
    return LatentDiffusionTeacher(parts, teacher.vocabulary, teacher.name_or_path, owner)
