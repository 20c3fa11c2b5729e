"""A trained teacher as a diffusers folder, which `StableDiffusionPipeline` loads, with its CLIP."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from distill.runtime.errors import UserError
from distill.runtime.files import atomic_folder, read_json, write_json
from distill.runtime.shipped import resolve
from distill.teacher.latent import LatentDiffusionTeacher
from distill.teacher.multi_view import MultiViewUNet, load_view_conditions, save_view_conditions
from distill.teacher.vocabulary import VOCABULARY, save_vocabulary

CLIP = "clip"  # the whole CLIP, image tower too, for scores and zero-shot labels


class TeacherParts(NamedTuple):
    """What a U-Net is trained on."""

    tokenizer: CLIPTokenizer
    vocabulary: list[str]
    clip: CLIPModel
    vae: AutoencoderKL


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """CLIP's text tower as a pipeline's text encoder, with the same weights."""
    encoder = CLIPTextModel(clip.config.text_config)
    expected = set(encoder.state_dict())
    weights = {
        name if name in expected else name.removeprefix("text_model."): value
        for name, value in clip.state_dict().items()
    }
    encoder.load_state_dict({name: value for name, value in weights.items() if name in expected})
    return encoder.eval()


def save_teacher(folder: Path | str, parts: TeacherParts, unet: UNet2DConditionModel, scheduler: Any) -> None:
    """Write the folder in fp16 safetensors, atomically; an older teacher there is replaced.

    The U-Net is a stock one; what a multi-view one has besides is in `view_conditions/`.

    Raises `UserError` when the folder holds something other than a teacher.
    """
    with atomic_folder(folder, "model_index.json", "a teacher") as temporary:
        pipeline = StableDiffusionPipeline(
            vae=copy.deepcopy(parts.vae),  # the caller's modules keep their precision
            text_encoder=text_encoder_of(parts.clip),
            tokenizer=parts.tokenizer,
            unet=unet.stock() if isinstance(unet, MultiViewUNet) else copy.deepcopy(unet),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        save_pipeline(temporary, pipeline)
        if isinstance(unet, MultiViewUNet):
            save_view_conditions(temporary, unet)
        copy.deepcopy(parts.clip).half().save_pretrained(temporary / CLIP)
        save_vocabulary(temporary / "tokenizer", parts.tokenizer, parts.vocabulary)


def save_pipeline(folder: Path, pipeline: StableDiffusionPipeline, exact: Sequence[str] = ()) -> None:
    """Save a pipeline in fp16, converting it in place; loaded without a dtype it is all float32.

    The modules named in `exact` stay float32 where fp16 would change one of their weights.
    """
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module) and not (name in exact and _rounds_in_half(module)):
            module.half()
    pipeline.save_pretrained(folder)
    # Without a dtype, transformers uses its config's but diffusers float32, and the two cannot be combined.
    config = folder / "text_encoder" / "config.json"
    write_json(config, {**read_json(config), "dtype": "float32"})


def _rounds_in_half(module: nn.Module) -> bool:
    return any(not torch.equal(value.half().to(value), value) for value in module.state_dict().values())


def original_parts(teacher: LatentDiffusionTeacher) -> tuple[CLIPTextModel, AutoencoderKL]:
    """Copies of a teacher's text encoder and VAE, with the weights of its folder where it rounded them."""
    name, dtype = teacher.name_or_path, torch.float32
    if teacher.precision.dtype == dtype or not name:
        return copy.deepcopy(teacher.text_encoder), copy.deepcopy(teacher.vae)
    text_encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", dtype=dtype)
    return text_encoder, AutoencoderKL.from_pretrained(name, subfolder="vae", dtype=dtype)


def save_parts(folder: Path | str, parts: TeacherParts) -> None:
    """Tokenizer, CLIP and VAE in fp16, in the layout of a teacher's folder."""
    folder = Path(folder)
    copy.deepcopy(parts.vae).half().save_pretrained(folder / "vae")
    copy.deepcopy(parts.clip).half().save_pretrained(folder / CLIP)
    save_vocabulary(folder / "tokenizer", parts.tokenizer, parts.vocabulary)


def load_parts(folder: Path | str, device: torch.device | str = "cpu") -> TeacherParts:
    """The parts (float32, frozen) in a teacher's folder or one of `save_parts`, on a device.

    Raises `UserError` where one of them is missing.
    """
    folder = resolve("teacher", folder)
    vocabulary = folder / "tokenizer" / VOCABULARY
    if not vocabulary.is_file() or not (folder / "vae" / "config.json").is_file():
        raise UserError(
            f"{folder} holds no tokenizer and VAE of a teacher trained here: give one of train_teacher.py"
        )
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    vae = vae.to(device, memory_format=torch.channels_last)
    return TeacherParts(tokenizer, read_json(vocabulary), load_clip(folder, device), vae)


def load_unet(folder: Path | str) -> UNet2DConditionModel:
    """The U-Net of a teacher's folder, float32. Raises `UserError` where there is none."""
    path = resolve("teacher", folder) / "unet"
    if not (path / "config.json").is_file():
        raise UserError(f"{folder} holds no U-Net: give a teacher's folder, or reuse_unet=false")
    return load_view_conditions(path.parent, UNet2DConditionModel.from_pretrained(path, dtype=torch.float32))


def load_initial(module: nn.Module, initial: nn.Module, name: str) -> None:
    """Copy the weights of `initial`. Raises `UserError` where its size differs; `name` is the part's."""
    try:
        module.load_state_dict(initial.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the initial {name} has another size ({reason}): give its options") from None


def load_clip(folder: Path | str, device: torch.device | str = "cpu") -> CLIPModel:
    """The whole CLIP of a teacher's folder, float32, frozen, on a device.

    Raises `UserError` where there is none, as in the folders of Stable Diffusion.
    """
    path = Path(folder) / CLIP
    if not (path / "config.json").is_file():
        raise UserError(f"{folder} has no {CLIP} folder: CLIP scores need a teacher trained here")
    clip: Any = CLIPModel.from_pretrained(path, dtype=torch.float32)  # its `to` is untyped
    return clip.to(device).eval().requires_grad_(False)
