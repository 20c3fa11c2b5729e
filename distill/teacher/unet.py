"""The denoiser: `diffusers.UNet2DConditionModel`, trained on cached latents and text embeddings."""

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from distill.core.noise import NoiseSchedule
from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.data.folders import batch_indices
from distill.data.latents import LatentCache
from distill.runtime.ema import EMA
from distill.runtime.errors import UserError
from distill.runtime.optim import one_cycle, optimizer_step
from distill.runtime.run import Run
from distill.teacher.denoiser import UNetDenoiser


@dataclass(frozen=True)
class UnetOptions:
    """Size and training of the denoiser, and the noise schedule it is trained for."""

    channels: tuple[int, ...] = (64, 128)
    layers: int = 1
    heads: int = 4
    batch: int = 64
    learning_rate: float = 1.5e-3
    caption_dropout: float = 0.1  # from the first step on, for classifier-free guidance
    ema: float = 0.999
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    schedule: Literal["scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    zero_snr: bool = True  # rescale so that the last level is pure noise (Lin et al. 2023, arXiv:2305.08891)
    preview_guidance: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1:
            raise UserError(f"caption_dropout is {self.caption_dropout}: expected a fraction in [0, 1)")
        if self.zero_snr and self.prediction == "epsilon":
            raise UserError(
                "prediction=epsilon is undefined at zero terminal SNR: use v_prediction, or zero_snr=false"
            )


def make_scheduler(options: UnetOptions) -> DDIMScheduler:
    """The schedule in diffusers' form; trailing spacing, so that sampling starts from the last level."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=options.schedule,
        prediction_type=options.prediction,
        rescale_betas_zero_snr=options.zero_snr,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # unused with trailing spacing; the stock pipeline warns at 0
    )


def build_unet(
    options: UnetOptions, latent_channels: int, side: int, text_width: int
) -> UNet2DConditionModel:
    """An untrained denoiser with cross-attention on every level."""
    levels = len(options.channels)
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=options.channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=options.layers,
        attention_head_dim=options.heads,  # diffusers reads it as the number of heads here
        norm_num_groups=16,
        cross_attention_dim=text_width,
    ).to(memory_format=torch.channels_last)


def train_unet(
    run: Run,
    cache: LatentCache,
    vae: AutoencoderKL,
    options: UnetOptions,
    initial: UNet2DConditionModel | None = None,
) -> UNet2DConditionModel:
    """Train on cached latents; returns the EMA weights in evaluation mode.

    `initial` is a trained U-Net of the same size to start from.
    """
    scheduler = make_scheduler(options)
    shape, width = cache.latents.shape[1:], cache.conditioning.embedding.shape[-1]

    def build() -> UNetDenoiser:
        unet = build_unet(options, shape[0], shape[-1], width).to(run.device)
        return UNetDenoiser(unet, NoiseSchedule(scheduler.alphas_cumprod), options.prediction)

    denoiser, averaged = build(), build()
    unet = denoiser.network
    if initial is not None:
        load_initial(unet, initial)
    averaged.eval().requires_grad_(False)
    if run.options.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if run.compiled:
        unet.compile()
    ema = EMA(unet, options.ema)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.learning_rate, weight_decay=0.01, fused=True)
    lr_schedule = one_cycle(optimizer, run.options.steps, warmup=0.05)
    run.track(model=unet, optimizer=optimizer, schedule=lr_schedule, ema=ema)

    previewed = cache.conditioning.select(torch.arange(32) * cache.num_captions // 32).to(run.device)
    preview_noise = torch.randn(len(previewed), *shape, generator=torch.Generator().manual_seed(1))
    for step in run.steps():
        index = batch_indices(len(cache), options.batch, step, run.options.seed)
        t = torch.randint(denoiser.schedule.num_train_timesteps, (len(index),), generator=run.generator)
        noise = torch.randn(len(index), *shape, generator=run.generator)
        dropped = torch.rand(len(index), generator=run.generator) < options.caption_dropout
        latents, noise, t = (value.to(run.device) for value in (cache.latents_of(index), noise, t))
        conditioning = cache.conditioning_of(index, dropped).to(run.device)

        with run.precision.autocast():
            loss = denoiser.denoising_loss(latents, noise, t, conditioning)
        optimizer_step(optimizer, loss, max_norm=1.0, scaler=run.scaler)
        lr_schedule.step()
        ema.update()
        run.log(loss=loss.detach())

        if run.due(run.options.preview_every):
            ema.copy_to(averaged.network)
            model = Guided(averaged, cache.uncond.to(run.device), options.preview_guidance)
            with run.precision.autocast():
                samples = sample_ode(model, scheduler, previewed, preview_noise.to(run.device), 25)
            run.preview("samples", decode(vae, samples))
    ema.copy_to(averaged.network)
    return averaged.network


def load_initial(unet: UNet2DConditionModel, initial: UNet2DConditionModel) -> None:
    """Copy the weights of `initial`. Raises `UserError` where its size differs."""
    try:
        unet.load_state_dict(initial.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"the initial U-Net has another size ({reason}): give its channels, layers and VAE"
        ) from None


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of scaled latents (B, C, h, w)."""
    return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
