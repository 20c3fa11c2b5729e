"""Teachers by name: a shipped one, a diffusers folder, a hub id, or a YAML file that names another family."""

from pathlib import Path

import torch
import yaml

from distill.core.teacher import Teacher, TeacherSource
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.teacher.families import load_diffusers
from distill.teacher.pipeline import LatentTeacher, PipelineTeacher
from distill.teacher.tiny_autoencoder import with_autoencoder


def load_teacher(
    name_or_path: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    autoencoder: str | None = None,
) -> Teacher:
    """The teacher that `teacher=` names on the command line.

    A `.yaml` file holds the options of a `TeacherSource`, whose class is its `_target_`; anything else is a
    pipeline of diffusers (`load_diffusers`). autoencoder: a tiny one in place of its VAE
    (`load_tiny_autoencoder`). Raises `UserError` where there is no such teacher or autoencoder.
    """
    path = Path(name_or_path)
    if path.suffix != ".yaml":
        return with_autoencoder(load_diffusers(name_or_path, device, dtype), autoencoder)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"teacher {name_or_path} cannot be read ({reason}): give a YAML file") from None
    teacher = build(TeacherSource, values, "teacher").build(torch.device(device), dtype)
    return with_autoencoder(teacher, autoencoder)


def require_pipeline(teacher: Teacher) -> PipelineTeacher:
    """The teacher, for what needs a network of diffusers. Raises `UserError` for one of another family."""
    if not isinstance(teacher, PipelineTeacher):
        name = type(teacher).__name__
        raise UserError(f"teacher {teacher.name_or_path} is a {name}: a model of diffusers is needed here")
    return teacher


def require_latent(teacher: Teacher) -> LatentTeacher:
    """The teacher, for what needs a VAE and a U-Net. Raises `UserError` for one of another family."""
    if not isinstance(teacher, LatentTeacher):
        name = type(teacher).__name__
        raise UserError(
            f"teacher {teacher.name_or_path} is a {name}: a latent diffusion model is needed here"
        )
    return teacher
