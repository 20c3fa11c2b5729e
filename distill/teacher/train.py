"""The whole teacher from a captioned folder: CLIP, then VAE, then U-Net, each in its own `Run`; then one diffusers folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPTokenizer

from distill.data.folders import CaptionedImages, load_split
from distill.data.latents import LatentCache, cache_latents
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.teacher.clip import ClipOptions, hard_negative_stage, tokenize, train_clip
from distill.teacher.folder import Parts, load_parts, load_unet, save_parts, save_teacher
from distill.teacher.unet import UnetOptions, make_scheduler, train_unet
from distill.teacher.vae import AutoencoderKL, VaeOptions, train_vae
from distill.teacher.vocabulary import build_tokenizer, words_of


@dataclass(frozen=True)
class Steps:
    """Training steps of each part."""

    clip: int = 4500  # both towers, against random captions
    hard: int = 4500  # both again, against captions one word apart
    vae: int = 9000
    unet: int = 13500


@dataclass(frozen=True)
class TeacherOptions:
    """What a teacher is made of. `data` is a captioned image folder with the splits train and validation."""

    data: str
    reuse: str | None = (
        None  # a folder whose tokenizer, CLIP and VAE are taken as they are, so that only the U-Net is trained
    )
    reuse_unet: bool = (
        False  # the reused folder's U-Net is where training starts: a finished teacher is trained on
    )
    resolution: int = 64
    steps: Steps = field(default_factory=Steps)
    clip: ClipOptions = field(default_factory=ClipOptions)
    vae: VaeOptions = field(default_factory=VaeOptions)
    unet: UnetOptions = field(default_factory=UnetOptions)

    def __post_init__(self) -> None:
        if self.reuse_unet and self.reuse is None:
            raise UserError("reuse_unet goes on from the U-Net of a teacher: give teacher.reuse=its folder")
        if (
            self.resolution % (self.vae.factor * 2 ** (len(self.unet.channels) - 1))
            or self.resolution % self.clip.patch
        ):
            raise UserError(
                f"resolution {self.resolution} must be a multiple of the VAE factor times the U-Net's, and of the CLIP patch"
            )


def train_teacher(run: RunOptions, options: TeacherOptions) -> Path:
    """Train what is not trained yet and save the folder `<run.directory>/teacher`, whose path is returned.

    Each part resumes from its own checkpoints; `run.steps` is not used. Raises `UserError` for data that cannot serve.
    """
    data = load_split(options.data, "train", options.resolution)
    if options.reuse is None:
        validation = load_split(options.data, "validation", options.resolution)
        tokenizer, words, clip, vae = _first_parts(run, options, data, validation)
    else:
        tokenizer, words, clip, vae = load_parts(options.reuse)
        _check_captions(data, words)
    unet_run = _part(run, "unet", options.steps.unet, options.unet)
    start = load_unet(options.reuse) if options.reuse is not None and options.reuse_unet else None
    unet = train_unet(unet_run, prepare(clip, vae, data, tokenizer), vae, options.unet, start)
    unet_run.finish({})
    folder = Path(run.directory) / "teacher"
    save_teacher(folder, tokenizer, words, clip, vae, unet, make_scheduler(options.unet))
    return folder


def _part(run: RunOptions, name: str, steps: int, options: ClipOptions | VaeOptions | UnetOptions) -> Run:
    directory = str(Path(run.directory) / name)
    return Run(
        replace(run, directory=directory, steps=steps), {name: asdict(options), "seed": run.seed}, name
    )


def _first_parts(
    run: RunOptions, options: TeacherOptions, data: CaptionedImages, validation: CaptionedImages
) -> Parts:
    """Tokenizer, words, CLIP and VAE, trained on a split."""
    tokenizer, words = build_tokenizer(data.texts)
    clip_run = _part(run, "clip", options.steps.clip, options.clip)
    clip = train_clip(clip_run, data, tokenizer, options.clip)
    clip_run.finish({})
    hard_run = _part(run, "hard", options.steps.hard, options.clip)
    clip = hard_negative_stage(hard_run, clip, data, tokenizer, options.clip)
    hard_run.finish({})
    vae_run = _part(run, "vae", options.steps.vae, options.vae)
    vae = train_vae(vae_run, data, validation, options.vae)
    vae_run.finish({"scaling_factor": vae.config.scaling_factor})
    save_parts(Path(run.directory) / "parts", tokenizer, words, clip, vae)  # what `reuse` takes
    return tokenizer, words, clip, vae


def _check_captions(data: CaptionedImages, words: Sequence[str]) -> None:
    unknown = sorted({word for text in data.texts for word in words_of(text)} - set(words))
    if unknown:
        raise UserError(
            f"the reused teacher does not know {', '.join(unknown[:5])} of the captions: train without reuse"
        )


@torch.no_grad()
def prepare(
    clip: CLIPModel, vae: AutoencoderKL, data: CaptionedImages, tokenizer: CLIPTokenizer
) -> LatentCache:
    """Latents of a split and the text states of its distinct captions (and of the empty one), computed once."""
    texts = sorted(set(data.texts))
    ids = tokenize(tokenizer, [*texts, ""]).to(clip.device)
    states = [clip.text_model(input_ids=part).last_hidden_state for part in ids.split(512)]
    return cache_latents(vae, data, texts, torch.cat(states))
