"""Train a small autoencoder for a teacher's latents, which decodes several times faster than its VAE.

python scripts/train_tiny_autoencoder.py data=outputs/shapes64
Used by autoencoder=FOLDER of sample.py, text_to_3d.py and others; diffusers loads it as an AutoencoderTiny.
"""

import json
from dataclasses import dataclass, field

import torch
from entry import entry

from distill.data.folders import load_split
from distill.runtime.config import as_mapping
from distill.runtime.machine import pick_device
from distill.runtime.run import Run, RunOptions
from distill.teacher.load import load_teacher, require_latent
from distill.teacher.tiny_autoencoder import (
    TinyAutoencoderOptions,
    autoencoder_figures,
    save_tiny_autoencoder,
    train_tiny_autoencoder,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A tiny autoencoder (as TAESD) of a teacher's VAE."""

    run: RunOptions
    teacher: str = "shapes64"  # a shipped name, a diffusers folder or a hub id
    data: str = "outputs/shapes64"  # an image folder with the splits train and test
    autoencoder: TinyAutoencoderOptions = field(default_factory=TinyAutoencoderOptions)


def main(config: Config) -> None:
    device = pick_device(config.run.device)
    teacher = require_latent(load_teacher(config.teacher, device, torch.float32))
    train, test = (load_split(config.data, split, teacher.resolution) for split in ("train", "test"))
    run = Run(config.run, as_mapping(config), "tiny_autoencoder")
    tiny = train_tiny_autoencoder(run, teacher, train, config.autoencoder)
    figures = autoencoder_figures(teacher, tiny, test.composite(slice(None)))
    save_tiny_autoencoder(run.directory / "autoencoder", tiny, teacher, figures)
    run.finish(figures)
    print(json.dumps(figures, indent=2))
    print(f"written: {run.directory}/autoencoder")


if __name__ == "__main__":
    entry("train_tiny_autoencoder", Config, main)
