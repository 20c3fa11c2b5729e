"""Autoencoder (Rombach et al. 2022, arXiv:2112.10752): `diffusers.AutoencoderKL`, and its whitening."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from distill.data.folders import CaptionedImages, batch_indices, grey_levels
from distill.runtime import processes
from distill.runtime.errors import UserError
from distill.runtime.optim import accumulated_step, one_cycle
from distill.runtime.run import Run
from distill.runtime.transfer import upload
from distill.teacher.folder import load_initial


@dataclass(frozen=True)
class VaeOptions:
    """Size and training of the autoencoder."""

    factor: int = 8  # image side over latent side: 1, 2, 4, 8 or 16, with one to five levels of channels
    channels: tuple[int, ...] = (16, 32, 64, 128)  # one a resolution level; each level costs about the same
    latent_channels: int = 16  # 8x8x16: at a quarter of the U-Net's cost of 16x16x4; 8 loses wheels, eyes
    layers: int = 1
    batch: int = 16
    accumulate: int = 1  # parts of the batch whose gradients are added up, for less memory
    learning_rate: float = 2e-3
    gradient_weight: float = 1.0  # L1 between image gradients: edges
    kl_weight: float = 1e-4  # on the mean over latent elements

    def __post_init__(self) -> None:
        levels = len(self.channels)
        if self.factor not in (1, 2, 4, 8, 16) or 2 ** (levels - 1) != self.factor:
            raise UserError(
                f"VAE factor {self.factor} with {levels} levels: expected 1, 2, 4, 8 or 16, with one "
                "level more than it has factors of 2"
            )
        processes.check_accumulate(self.accumulate, self.batch)


def build_vae(options: VaeOptions, resolution: int) -> AutoencoderKL:
    """An untrained autoencoder; no attention, so that it is cheap to differentiate through."""
    levels = len(options.channels)
    vae = AutoencoderKL(
        block_out_channels=options.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=options.latent_channels,
        layers_per_block=options.layers,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=resolution,
        scaling_factor=1.0,
    )
    return vae.to(memory_format=torch.channels_last)  # halves the time of a step on the CPU


def gradient_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical finite differences of images (B, C, H, W)."""
    difference = prediction - target
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def reconstruction_loss(output: Tensor, images: Tensor, gradient_weight: float) -> tuple[Tensor, Tensor]:
    """The loss of images (B, 3, H, W) in [-1, 1] (L1, squared error, L1 of gradients), and the mean squared
    error in [0, 1] units for the PSNR.
    """
    mse = (output - images).square().mean()
    return (output - images).abs().mean() + mse + gradient_weight * gradient_loss(output, images), mse / 4


def vae_loss(vae: AutoencoderKL, images: Tensor, noise: Tensor, options: VaeOptions) -> tuple[Tensor, Tensor]:
    """The loss on images (B, 3, H, W) in [-1, 1], and the mean squared error in [0, 1] units for the PSNR."""
    encoded = vae.encode(images).latent_dist.parameters
    posterior = DiagonalGaussianDistribution(encoded.float())  # outside of the networks all is float32
    output = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    loss, mse = reconstruction_loss(output, images, options.gradient_weight)
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return loss + options.kl_weight * kl, mse


def local_losses(
    run: Run,
    vae: AutoencoderKL,
    data: CaptionedImages,
    batch: tuple[Tensor, Tensor, Tensor],
    options: VaeOptions,
    errors: list[Tensor],
) -> Iterator[Tensor]:
    """The weighted losses of this process's rows of a batch: rows and grey levels (B,), noise (B, C, h, w).

    Their squared errors are added to `errors`.
    """
    for local in processes.local_rows(len(batch[0]), options.accumulate):
        index, levels, noise = (value[local.rows] for value in batch)
        images = data.composite(index, levels).to(run.device) * 2 - 1
        images = images.contiguous(memory_format=torch.channels_last)
        with run.precision.autocast():
            loss, mse = vae_loss(vae, images, noise.to(run.device), options)
        errors.append(local.weight * mse.detach())
        yield local.weight * loss


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB from the mean squared error of images in [0, 1]."""
    return -10 * mse.log10()


def train_vae(
    run: Run,
    data: CaptionedImages,
    validation: CaptionedImages,
    options: VaeOptions,
    initial: AutoencoderKL | None = None,
) -> AutoencoderKL:
    """Train on a split, then whiten; returns the model in evaluation mode, `scaling_factor` measured.

    `initial` is a trained one of the same size to start from. Raises `UserError` where its size differs.
    """
    vae = build_vae(options, data.images.shape[-1]).to(run.device)
    if initial is not None:
        load_initial(vae, initial, "VAE")
    if run.options.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.learning_rate, weight_decay=1e-4)
    schedule = one_cycle(optimizer, run.options.steps, warmup=0.3 if initial is None else 0.05)
    run.track(model=vae, optimizer=optimizer, schedule=schedule)

    preview_images = validation.composite(slice(0, 16))
    side = data.images.shape[-1] // options.factor
    device, generator = run.data_device(data.images.nbytes)
    data = data.to(device)
    for step in run.steps():
        index = upload(batch_indices(len(data), options.batch, step, run.options.seed), device)
        levels = grey_levels(len(index), generator)
        shape = len(index), options.latent_channels, side, side
        noise = torch.randn(shape, generator=generator, device=device)
        errors: list[Tensor] = []

        losses = local_losses(run, vae, data, (index, levels, noise), options, errors)
        loss = accumulated_step(optimizer, losses, max_norm=1.0, scaler=run.scaler)
        schedule.step()
        run.log(loss=loss, psnr=psnr(torch.stack(errors).sum()))

        if run.due(run.options.preview_every):
            reconstructions = reconstruct(vae, preview_images).cpu()
            run.preview("reconstructions", torch.cat([preview_images, reconstructions]))

    whiten(vae.eval(), data, generator)
    return vae


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor, batch: int = 64) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] encoded to the posterior mean and decoded."""
    device = next(vae.parameters()).device
    parts = [
        vae.decode(vae.encode(part.to(device) * 2 - 1).latent_dist.mean).sample.cpu()
        for part in images.split(batch)
    ]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def whiten(vae: AutoencoderKL, data: CaptionedImages, generator: torch.Generator, count: int = 2000) -> None:
    """Fold a per-channel whitening of the latents into the adjacent 1x1 convolutions; set `scaling_factor`.

    Raw channels differ in mean and standard deviation, but a stock pipeline has a single scaling factor. The
    decoded images do not change.
    """
    chosen = torch.randperm(len(data), generator=generator, device=generator.device)[:count]
    levels, device = grey_levels(len(data)).to(generator.device), next(vae.parameters()).device
    images = (data.composite(part, levels[part]).to(device) for part in chosen.split(64))
    posteriors = [vae.encode(part * 2 - 1).latent_dist for part in images]
    samples = torch.cat([posterior.sample(generator) for posterior in posteriors])
    latents = samples.transpose(0, 1).flatten(1)
    mean, std = latents.mean(1), latents.std(1)

    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]

    white = (latents - mean[:, None]) / std[:, None]
    vae.register_to_config(scaling_factor=float(1 / white.std()))
