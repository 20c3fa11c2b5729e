"""A small autoencoder in place of a teacher's VAE: diffusers' `AutoencoderTiny`, trained on its latents.

As TAESD (github.com/madebyollin/taesd) for Stable Diffusion: the decoder learns to reconstruct the images
from the VAE's latents, the encoder to give the VAE's latents of the images, so that either can replace its
part.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from distill.core.teacher import Teacher
from distill.data.folders import CaptionedImages, batch_indices, grey_levels
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_folder, read_json, write_json
from distill.runtime.optim import one_cycle, optimizer_step
from distill.runtime.run import Run
from distill.runtime.transfer import upload
from distill.teacher.identity import identify_vae
from distill.teacher.pipeline import LatentTeacher
from distill.teacher.vae import psnr, reconstruction_loss

AnyTeacher = TypeVar("AnyTeacher", bound=Teacher)
FACTS = "autoencoder.json"  # the VAE whose latents it was trained on, and its figures


@dataclass(frozen=True)
class TinyAutoencoderOptions:
    """Size and training of a tiny autoencoder."""

    channels: int = 32  # of every layer
    blocks: tuple[int, ...] = (3, 3, 2, 0)  # residual blocks of the decoder's levels, coarse to fine
    batch: int = 16
    learning_rate: float = 3e-3
    latent_noise: float = 0.05  # standard deviation, added to latents: generated ones are not exact
    gradient_weight: float = 1.0  # L1 between image gradients: edges
    latent_weight: float = 1.0  # squared error of the encoder's latents

    def __post_init__(self) -> None:
        if self.channels < 1 or self.batch < 1 or self.learning_rate <= 0 or min(self.blocks, default=-1) < 0:
            raise UserError(
                "a tiny autoencoder needs channels and a batch of at least 1, a positive learning_rate and "
                "a number of blocks for each level"
            )


def build_tiny_autoencoder(teacher: LatentTeacher, options: TinyAutoencoderOptions) -> AutoencoderTiny:
    """An untrained one for a teacher's latents. Raises `UserError` where the levels differ from the VAE's."""
    config = teacher.vae.config
    levels = len(config.block_out_channels)
    if len(options.blocks) != levels:
        raise UserError(
            f"blocks are given for {len(options.blocks)} levels, and the VAE has {levels}: give a number each"
        )
    channels = (options.channels,) * levels
    tiny = AutoencoderTiny(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=options.blocks[::-1],
        num_decoder_blocks=options.blocks,
    )
    return tiny.to(teacher.device, memory_format=torch.channels_last)


def train_tiny_autoencoder(
    run: Run, teacher: LatentTeacher, data: CaptionedImages, options: TinyAutoencoderOptions
) -> AutoencoderTiny:
    """Train on a split's images over random grey levels; the result is in evaluation mode, as it is saved."""
    tiny = build_tiny_autoencoder(teacher, options)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=options.learning_rate, weight_decay=0.0)
    schedule = one_cycle(optimizer, run.options.steps, warmup=0.1)
    run.track(model=tiny, optimizer=optimizer, schedule=schedule)
    preview = data.composite(slice(0, 16))
    device, generator = run.data_device(data.images.nbytes)
    data = data.to(device)
    for step in run.steps():
        index = upload(batch_indices(len(data), options.batch, step, run.options.seed), device)
        images = data.composite(index, grey_levels(len(index), generator)).to(run.device)
        with torch.no_grad():
            latents = teacher.encode_images(images)
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(run.device)
        inputs = (latents + options.latent_noise * noise).contiguous(memory_format=torch.channels_last)
        scaled = (images * 2 - 1).contiguous(memory_format=torch.channels_last)
        with run.precision.autocast():
            output = tiny.decode(inputs).sample.float()
            encoded = tiny.encode(scaled).latents.float()
        image_loss, mse = reconstruction_loss(output, scaled, options.gradient_weight)
        latent_error = F.mse_loss(encoded, latents)
        optimizer_step(
            optimizer, image_loss + options.latent_weight * latent_error, max_norm=1.0, scaler=run.scaler
        )
        schedule.step()
        run.log(loss=image_loss.detach(), psnr=psnr(mse.detach()), latent_error=latent_error.detach())
        if run.due(run.options.preview_every):
            run.preview("reconstructions", torch.cat([preview, decoded(teacher, tiny, preview)]))
    return tiny.half().float().eval().requires_grad_(False)


@torch.no_grad()
def decoded(teacher: LatentTeacher, tiny: AutoencoderTiny, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] encoded by the teacher's VAE and decoded by the tiny autoencoder."""
    latents = teacher.encode_images(images.to(teacher.device))
    return (tiny.decode(latents).sample / 2 + 0.5).clamp(0, 1).to(images.device)


@torch.no_grad()
def autoencoder_figures(
    teacher: LatentTeacher, tiny: AutoencoderTiny, images: Tensor, batch: int = 64
) -> dict[str, float]:
    """PSNR in dB of images (N, 3, H, W) in [0, 1], by the VAE and by either part of the tiny one.

    `vae`: encoded and decoded by the VAE; `decoder`: decoded by the tiny one; `encoder`: encoded by it and
    decoded by the VAE; `latent_error`: the mean squared difference of the two encoders' latents.
    """
    errors: dict[str, list[Tensor]] = {name: [] for name in ("vae", "decoder", "encoder", "latent_error")}
    for part in images.split(batch):
        part = part.to(teacher.device)
        latents, encoded = teacher.encode_images(part), tiny.encode(part * 2 - 1).latents
        outputs = {
            "vae": teacher.decode(latents),
            "decoder": decoded(teacher, tiny, part),
            "encoder": teacher.decode(encoded),
        }
        for name, output in outputs.items():
            errors[name].append((output - part).square().flatten(1).mean(1))
        errors["latent_error"].append((encoded - latents).square().flatten(1).mean(1))
    means = {name: torch.cat(values).mean() for name, values in errors.items()}
    return {name: float(value if name == "latent_error" else psnr(value)) for name, value in means.items()}


def save_tiny_autoencoder(
    folder: Path | str, tiny: AutoencoderTiny, teacher: LatentTeacher, figures: dict[str, float]
) -> None:
    """Write a folder that `AutoencoderTiny.from_pretrained` loads, in fp16, and what VAE it stands for.

    Raises `UserError` where the folder holds something else.
    """
    with atomic_folder(folder, FACTS, "a tiny autoencoder") as temporary:
        tiny.half().save_pretrained(temporary)
        tiny.float()
        write_json(temporary / FACTS, {"vae": identify_vae(teacher.vae), "figures": figures})


def load_tiny_autoencoder(name_or_path: Path | str, teacher: LatentTeacher) -> AutoencoderTiny:
    """One of a folder, or of a hub id such as `madebyollin/taesd`; frozen, on the teacher's device and in
    its VAE's dtype.

    Raises `UserError` where there is none, and for one that stands for another VAE.
    """
    folder = Path(name_or_path)
    local = folder.is_dir()
    try:
        tiny = AutoencoderTiny.from_pretrained(
            str(folder if local else name_or_path), local_files_only=local, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"autoencoder {str(name_or_path)!r} cannot be loaded ({reason}): give a folder of "
            "train_tiny_autoencoder.py, or a hub id such as madebyollin/taesd"
        ) from None
    own, vae = tiny.config, teacher.vae.config
    if (own.latent_channels, len(own.block_out_channels)) != (
        vae.latent_channels,
        len(vae.block_out_channels),
    ):
        raise UserError(
            f"autoencoder {name_or_path} has latents of {own.latent_channels} channels at "
            f"{len(own.block_out_channels)} levels, and the VAE of teacher {teacher.name_or_path} has "
            f"{vae.latent_channels} and {len(vae.block_out_channels)}: give one of that VAE"
        )
    facts = read_json(folder / FACTS) if (folder / FACTS).is_file() else {}
    owner, digest = facts.get("vae"), identify_vae(teacher.vae)
    if owner is not None and digest is not None and owner != digest:
        raise UserError(
            f"autoencoder {name_or_path} was trained on the latents of another VAE than that of teacher "
            f"{teacher.name_or_path}: train one (scripts/train_tiny_autoencoder.py)"
        )
    tiny.to(teacher.device, teacher.vae.dtype, memory_format=torch.channels_last)
    return tiny.eval().requires_grad_(False)


def with_autoencoder(teacher: AnyTeacher, name_or_path: str | None) -> AnyTeacher:
    """The teacher, its VAE replaced by a tiny autoencoder; as it is for None.

    Raises `UserError` for a teacher without latents, and as `load_tiny_autoencoder`.
    """
    if name_or_path is None:
        return teacher
    if not isinstance(teacher, LatentTeacher):
        raise UserError(
            f"autoencoder is {name_or_path}, but a {type(teacher).__name__} has no VAE: leave it out"
        )
    teacher.vae = load_tiny_autoencoder(name_or_path, teacher)
    return teacher
