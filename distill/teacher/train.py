"""The whole teacher from a captioned folder: CLIP, then VAE, then U-Net, each in its own `Run`; then one diffusers folder."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import CLIPModel

from distill.data import Captioned, load_split
from distill.errors import UserError
from distill.run import Run, RunOptions
from distill.teacher.clip import ClipOptions, tokenize, train_clip
from distill.teacher.folder import save_teacher
from distill.teacher.unet import LatentCache, UnetOptions, cache_latents, make_scheduler, train_unet
from distill.teacher.vae import AutoencoderKL, VaeOptions, train_vae
from distill.teacher.vocabulary import build_tokenizer


@dataclass(frozen=True)
class Steps:
    """Training steps of each part."""

    clip: int = 3000
    vae: int = 3500
    unet: int = 8000


@dataclass(frozen=True)
class TeacherOptions:
    """What a teacher is made of. `data` is a captioned image folder with the splits train and validation."""

    data: str
    resolution: int = 64
    steps: Steps = field(default_factory=Steps)
    clip: ClipOptions = field(default_factory=ClipOptions)
    vae: VaeOptions = field(default_factory=VaeOptions)
    unet: UnetOptions = field(default_factory=UnetOptions)

    def __post_init__(self) -> None:
        if self.resolution % (self.vae.factor * 2 ** (len(self.unet.channels) - 1)) or self.resolution % self.clip.patch:
            raise UserError(f"resolution {self.resolution} must be a multiple of the VAE factor times the U-Net's, and of the CLIP patch")


def train_teacher(run: RunOptions, options: TeacherOptions) -> Path:
    """Train what is not trained yet and save the folder `<run.directory>/teacher`, whose path is returned.

    Each part resumes from its own checkpoints; `run.steps` is not used. Raises `UserError` for data that cannot serve.
    """
    root = Path(run.directory)
    data = load_split(options.data, "train", options.resolution)
    validation = load_split(options.data, "validation", options.resolution)
    tokenizer, words = build_tokenizer(data.texts)

    def part(name: str, steps: int, config: object) -> Run:
        return Run(replace(run, directory=str(root / name), steps=steps), {name: asdict(config), "seed": run.seed}, name)  # type: ignore[call-overload]

    clip_run = part("clip", options.steps.clip, options.clip)
    clip = train_clip(clip_run, data, tokenizer, options.clip)
    clip_run.finish({})
    vae_run = part("vae", options.steps.vae, options.vae)
    vae = train_vae(vae_run, data, validation, options.vae)
    vae_run.finish({"scaling_factor": vae.config.scaling_factor})
    unet_run = part("unet", options.steps.unet, options.unet)
    unet = train_unet(unet_run, prepare(clip, vae, data, tokenizer), vae, options.unet)
    unet_run.finish({})
    save_teacher(root / "teacher", tokenizer, words, clip, vae, unet, make_scheduler(options.unet))
    return root / "teacher"


@torch.no_grad()
def prepare(clip: CLIPModel, vae: AutoencoderKL, data: Captioned, tokenizer: object) -> LatentCache:
    """Latents of a split and the text states of its distinct captions (and of the empty one), computed once."""
    texts = sorted(set(data.texts))
    ids = tokenize(tokenizer, [*texts, ""]).to(clip.device)  # type: ignore[arg-type]
    states = [clip.text_model(input_ids=part).last_hidden_state for part in ids.split(512)]
    return cache_latents(vae, data, texts, torch.cat(states))
