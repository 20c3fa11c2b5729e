"""Teachers without weights: the networks of a diffusers pipeline on the meta device."""

import pydoc
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from distill.core.teacher import Teacher
from distill.planning.architectures import ARCHITECTURES, Architecture
from distill.runtime import shipped
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.families import STABLE_DIFFUSION, build_teacher
from distill.teacher.latent import UNUSED, LatentDiffusionTeacher
from distill.teacher.multi_view import FOLDER, MultiViewUNet, ViewConditionOptions
from distill.teacher.pipeline import LatentTeacher

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


class _Tokenizer:
    """In place of a tokenizer that is not on this machine: every text is as long as the context."""

    model_max_length = 77

    def __call__(
        self,
        texts: Sequence[str],
        padding: str = "",
        max_length: int | None = None,
        truncation: bool = True,
        add_special_tokens: bool = True,
        return_tensors: str = "pt",
        verbose: bool = False,
    ) -> SimpleNamespace:
        length = self.model_max_length if max_length is None else max_length
        return SimpleNamespace(input_ids=torch.zeros(len(texts), length, dtype=torch.long))

    def tokenize(self, text: str) -> list[str]:
        """No words, of which some could be textual inversions."""
        return []


def meta_teacher(name_or_path: str, dtype: torch.dtype) -> Teacher:
    """The teacher that `teacher=` names, its weights of `dtype` on the meta device, nothing read but configs.

    Raises `UserError` where its architecture is not known here.
    """
    folder = shipped.resolve("teacher", name_or_path)
    published = ARCHITECTURES.get(Path(name_or_path).name)
    if (folder / "model_index.json").is_file():
        name, parts = _from_folder(folder)
    elif published is not None:
        name, parts = published[0], _from_architecture(published[1])
    else:
        raise UserError(
            f"teacher {name_or_path!r} cannot be planned: expected a diffusers folder, or a name that ends "
            f"in one of {', '.join(ARCHITECTURES)}"
        )
    for part in parts.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype)  # diffusers' own warns of precisions that it is not asked to keep
    if name == STABLE_DIFFUSION:
        return LatentDiffusionTeacher(parts, None, name_or_path)
    pipeline: Any = pydoc.locate(f"diffusers.{name}")
    return build_teacher(name, pipeline(**parts), name_or_path)


def _from_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    """The class and the parts of a diffusers folder; tokenizers and schedulers are the folder's own."""
    index = read_json(folder / "model_index.json")
    entries = {name: value for name, value in index.items() if isinstance(value, list)}
    parts = {
        name: None if value[0] is None or name in UNUSED else _part(folder / name, *value)
        for name, value in entries.items()
    }
    return str(index["_class_name"]), parts


def _part(folder: Path, library: str, name: str) -> Any:
    """A part of a folder, networks without weights; a multi-view U-Net with all of its layers."""
    cls: Any = pydoc.locate(f"{library}.{name}")
    views = folder.parent / FOLDER / "config.json"
    with torch.device("meta"):
        if folder.name == "unet" and views.is_file():
            unet = MultiViewUNet.from_config(read_json(folder / "config.json"))
            return unet.add_view_conditions(build(ViewConditionOptions, read_json(views), str(views)))
        if issubclass(cls, ModelMixin):
            return cls.from_config(read_json(folder / "config.json"))
        if issubclass(cls, PreTrainedModel):
            return cls(cls.config_class.from_pretrained(folder))
    return cls.from_pretrained(folder)


def _from_architecture(architecture: Architecture) -> dict[str, Any]:
    """Networks by their configs, and the scheduler; a stand-in for each tokenizer."""
    parts: dict[str, Any] = {}
    for name, (library, cls_name, config) in architecture.items():
        cls: Any = pydoc.locate(f"{library}.{cls_name}")
        with torch.device("meta"):
            if issubclass(cls, PreTrainedModel):
                config_class: type[PretrainedConfig] = cls.config_class
                parts[name] = cls(config_class(**config))
            elif issubclass(cls, ModelMixin):
                parts[name] = cls(**config)
        if name not in parts:
            parts[name] = cls(**config)
    encoders = sum(name.startswith("text_encoder") for name in parts)
    return parts | {name: _Tokenizer() for name in TOKENIZERS[:encoders]}


def teacher_modules(teacher: Teacher) -> dict[str, torch.nn.Module]:
    """The networks of a teacher by name."""
    if not isinstance(teacher, LatentTeacher):
        return {"teacher": teacher.denoiser}
    name = "U-Net" if isinstance(teacher.denoiser, UNetDenoiser) else "transformer"
    numbers = ("", *(f" {index}" for index in range(2, len(teacher.text_encoders) + 1)))
    encoders = zip(numbers, teacher.text_encoders, strict=True)
    return {
        name: teacher.network,
        "VAE encoder": teacher.vae.encoder,
        "VAE decoder": teacher.vae.decoder,
        **{f"text encoder{number}": encoder for number, encoder in encoders},
    }
