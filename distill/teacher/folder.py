"""Trained parts to a complete diffusers folder: what `StableDiffusionPipeline.from_pretrained` loads, and CLIP beside it."""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from distill.runtime.errors import UserError
from distill.runtime.files import read_json, replaced_folder, write_json
from distill.runtime.shipped import located
from distill.teacher.vocabulary import WORDS, save_vocabulary

Parts = tuple[CLIPTokenizer, list[str], CLIPModel, AutoencoderKL]
CLIP = "clip"  # the whole CLIP, image tower too, for scores and zero-shot labels


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """CLIP's text tower as a pipeline's text encoder, with the same weights."""
    encoder = CLIPTextModel(clip.config.text_config)
    own = set(encoder.state_dict())
    weights = {
        name if name in own else name.removeprefix("text_model."): value
        for name, value in clip.state_dict().items()
    }
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
    with replaced_folder(folder, "model_index.json", "a teacher") as temporary:
        save_pipeline(
            temporary,
            StableDiffusionPipeline(
                vae=copy.deepcopy(vae),  # the caller's parts keep their precision
                text_encoder=text_encoder_of(clip),
                tokenizer=tokenizer,
                unet=copy.deepcopy(unet),
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            ),
        )
        copy.deepcopy(clip).half().save_pretrained(temporary / CLIP)
        save_vocabulary(temporary / "tokenizer", tokenizer, words)


def save_pipeline(folder: Path, pipeline: StableDiffusionPipeline) -> None:
    """A pipeline's parts in fp16, in which they are left; loaded without a dtype they are all float32.

    transformers takes the dtype of its config where diffusers takes float32: unlike, they do not run together.
    """
    pipeline.to(torch.float16).save_pretrained(folder)
    config = folder / "text_encoder" / "config.json"
    write_json(config, {**read_json(config), "dtype": "float32"})


def save_parts(
    folder: Path | str, tokenizer: CLIPTokenizer, words: list[str], clip: CLIPModel, vae: AutoencoderKL
) -> None:
    """What a U-Net is trained on, in fp16: tokenizer, CLIP and VAE, in a teacher folder's places."""
    folder = Path(folder)
    copy.deepcopy(vae).half().save_pretrained(folder / "vae")
    copy.deepcopy(clip).half().save_pretrained(folder / CLIP)
    save_vocabulary(folder / "tokenizer", tokenizer, words)


def load_parts(folder: Path | str) -> Parts:
    """Tokenizer, words, CLIP and VAE (float32, frozen) of a teacher's folder or of `save_parts`.

    Raises `UserError` where one of them is missing.
    """
    folder = located("teacher", folder)
    words = folder / "tokenizer" / WORDS
    if not words.is_file() or not (folder / "vae" / "config.json").is_file():
        raise UserError(
            f"{folder} holds no tokenizer and VAE of a teacher trained here: give a folder that train_teacher.py wrote"
        )
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return tokenizer, read_json(words), load_clip(folder), vae.to(memory_format=torch.channels_last)


def load_unet(folder: Path | str) -> UNet2DConditionModel:
    """The U-Net of a teacher's folder, float32. Raises `UserError` where there is none."""
    place = located("teacher", folder) / "unet"
    if not (place / "config.json").is_file():
        raise UserError(f"{folder} holds no U-Net: give a teacher's folder, or reuse_unet=false")
    return UNet2DConditionModel.from_pretrained(place, dtype=torch.float32)


def load_clip(folder: Path | str) -> CLIPModel:
    """The whole CLIP of a teacher's folder, float32, frozen. Raises `UserError` where there is none (Stable Diffusion's folders)."""
    place = Path(folder) / CLIP
    if not (place / "config.json").is_file():
        raise UserError(f"{folder} has no {CLIP} folder: CLIP scores need a teacher trained here")
    return CLIPModel.from_pretrained(place, dtype=torch.float32).eval().requires_grad_(False)
