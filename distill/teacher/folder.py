"""Trained parts to a complete diffusers folder: what `StableDiffusionPipeline.from_pretrained` loads, and CLIP beside it."""

import copy
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from distill.errors import UserError
from distill.teacher.vocabulary import save_vocabulary

CLIP = "clip"  # the whole CLIP, image tower too, for scores and zero-shot labels


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """CLIP's text tower as a pipeline's text encoder, with the same weights."""
    encoder = CLIPTextModel(clip.config.text_config)
    own = set(encoder.state_dict())
    weights = {name if name in own else name.removeprefix("text_model."): value for name, value in clip.state_dict().items()}
    encoder.load_state_dict({name: value for name, value in weights.items() if name in own})
    return encoder.eval()


def save_teacher(
    folder: Path | str,
    tokenizer: CLIPTokenizer,
    words: list[str],
    clip: CLIPModel,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> None:
    """Write the folder in fp16 safetensors, whole or not at all; an older teacher in its place is replaced.

    Raises `UserError` when the folder holds something other than a teacher.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} holds something other than a teacher: choose another folder")
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae),  # the caller's parts keep their precision
        text_encoder=text_encoder_of(clip),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(temporary)
    copy.deepcopy(clip).half().save_pretrained(temporary / CLIP)
    save_vocabulary(temporary / "tokenizer", tokenizer, words)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def load_clip(folder: Path | str) -> CLIPModel:
    """The whole CLIP of a teacher's folder, float32, frozen. Raises `UserError` where there is none (Stable Diffusion's folders)."""
    place = Path(folder) / CLIP
    if not (place / "config.json").is_file():
        raise UserError(f"{folder} has no {CLIP} folder: CLIP scores need a teacher trained here")
    return CLIPModel.from_pretrained(place, dtype=torch.float32).eval().requires_grad_(False)
