"""A teacher from a captioned folder: CLIP in two stages, VAE and U-Net, each in its own `Run`."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from distill.core.conditioning import Conditioning
from distill.data.folders import CaptionedImages, load_split
from distill.data.latents import LatentCache, cache_latents
from distill.runtime.errors import UserError
from distill.runtime.machine import pick_device
from distill.runtime.run import Run, RunOptions
from distill.teacher.clip import ClipOptions, hard_negative_stage, tokenize, train_clip
from distill.teacher.folder import TeacherParts, load_parts, load_unet, save_parts, save_teacher
from distill.teacher.unet import UnetOptions, make_scheduler, train_unet
from distill.teacher.vae import AutoencoderKL, VaeOptions, train_vae
from distill.teacher.vocabulary import build_tokenizer, check_length, tokenizer_fingerprint, words_of


@dataclass(frozen=True)
class Steps:
    """Training steps of each part."""

    clip: int = 4500  # both towers, random captions as negatives
    hard_negatives: int = 4500  # both towers again, captions one word apart as negatives
    vae: int = 9000
    unet: int = 13500


@dataclass(frozen=True)
class TeacherOptions:
    """Data, sizes and training; `data` is a captioned image folder with the splits train and validation."""

    data: str = "outputs/shapes64"
    reuse: str | None = None  # a teacher's folder: keep its tokenizer, CLIP and VAE, train the U-Net only
    reuse_unet: bool = False  # initialise from the reused folder's U-Net: fine-tune a finished teacher
    resolution: int = 64
    steps: Steps = field(default_factory=Steps)
    clip: ClipOptions = field(default_factory=ClipOptions)
    vae: VaeOptions = field(default_factory=VaeOptions)
    unet: UnetOptions = field(default_factory=UnetOptions)

    def __post_init__(self) -> None:
        if self.reuse_unet and self.reuse is None:
            raise UserError("reuse_unet starts from the U-Net of a teacher: give teacher.reuse=its folder")
        multiple = self.vae.factor * 2 ** (len(self.unet.channels) - 1)
        if self.resolution % multiple or self.resolution % self.clip.patch:
            raise UserError(
                f"resolution {self.resolution} must be a multiple of {multiple} (the VAE factor times the"
                f" U-Net's) and of the CLIP patch {self.clip.patch}"
            )


def train_teacher(run: RunOptions, options: TeacherOptions) -> Path:
    """Train the missing parts and save the folder `<run.directory>/teacher`, whose path is returned.

    Each part resumes from its own checkpoints; `run.steps` is not used. Raises `UserError` for data that does
    not exist or does not fit.
    """
    data = load_split(options.data, "train", options.resolution)
    initial_unet = None
    if options.reuse is None:
        validation = load_split(options.data, "validation", options.resolution)
        parts = _train_parts(run, options, data, validation)
    else:
        parts = load_parts(options.reuse, pick_device(run.device))
        _check_captions(data, parts)
        initial_unet = load_unet(options.reuse) if options.reuse_unet else None

    unet_run = _part_run(run, "unet", options.steps.unet, options.unet)
    cache = prepare(parts.clip, parts.vae, data, parts.tokenizer)
    unet = train_unet(unet_run, cache, parts.vae, options.unet, initial_unet)
    unet_run.finish({})
    folder = Path(run.directory) / "teacher"
    save_teacher(folder, parts, unet, make_scheduler(options.unet))
    return folder


def _part_run(
    run: RunOptions, name: str, steps: int, options: ClipOptions | VaeOptions | UnetOptions, **config: str
) -> Run:
    part = replace(run, directory=str(Path(run.directory) / name), steps=steps)
    return Run(part, {name: asdict(options), "seed": run.seed, **config}, name)


def _train_parts(
    run: RunOptions, options: TeacherOptions, data: CaptionedImages, validation: CaptionedImages
) -> TeacherParts:
    """Tokenizer, CLIP and VAE, trained on a split and saved in `<run.directory>/parts` for `reuse`."""
    tokenizer, vocabulary = build_tokenizer(data.texts, options.clip.context_length)
    check_length(
        tokenizer, sorted(set(data.texts)), remedy="raise teacher.clip.context_length, or shorten the caption"
    )
    token_ids = tokenizer_fingerprint(tokenizer)  # a checkpoint's embeddings fit these ids only

    clip_run = _part_run(run, "clip", options.steps.clip, options.clip, tokenizer=token_ids)
    clip = train_clip(clip_run, data, tokenizer, options.clip)
    clip_run.finish({})

    hard_run = _part_run(
        run, "hard_negatives", options.steps.hard_negatives, options.clip, tokenizer=token_ids
    )
    clip = hard_negative_stage(hard_run, clip, data, tokenizer, options.clip)
    hard_run.finish({})

    vae_run = _part_run(run, "vae", options.steps.vae, options.vae)
    vae = train_vae(vae_run, data, validation, options.vae)
    vae_run.finish({"scaling_factor": vae.config.scaling_factor})

    parts = TeacherParts(tokenizer, vocabulary, clip, vae)
    save_parts(Path(run.directory) / "parts", parts)
    return parts


def _check_captions(data: CaptionedImages, parts: TeacherParts) -> None:
    """Raise `UserError` for captions that a reused text encoder cannot read in full."""
    unknown = sorted({word for text in data.texts for word in words_of(text)} - set(parts.vocabulary))
    if unknown:
        raise UserError(
            f"words of the captions are not in the reused vocabulary: {', '.join(unknown[:5])};"
            " train without reuse"
        )
    check_length(
        parts.tokenizer, sorted(set(data.texts)), remedy="shorten the caption, or train without reuse"
    )


@torch.no_grad()
def prepare(
    clip: CLIPModel, vae: AutoencoderKL, data: CaptionedImages, tokenizer: CLIPTokenizer
) -> LatentCache:
    """Latents of a split and the text embeddings of its distinct captions and of the empty one."""
    captions = sorted(set(data.texts))
    ids = tokenize(tokenizer, [*captions, ""]).to(clip.device)
    embeddings = torch.cat([clip.text_model(input_ids=part).last_hidden_state for part in ids.split(512)])

    def encode(images: Tensor) -> Tensor:
        return vae.encode(images.to(vae.device) * 2 - 1).latent_dist.mean * vae.config.scaling_factor

    return cache_latents(encode, data, captions, Conditioning(embeddings))
