"""The denoiser: `diffusers.UNet2DConditionModel`, trained on cached latents and text embeddings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.core.flow_scheduler import ode_scheduler, parameterisation
from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.data.latents import LatentCache
from distill.data.views import ViewLabels
from distill.runtime import processes
from distill.runtime.ema import EMA
from distill.runtime.errors import UserError
from distill.runtime.muon import Muon
from distill.runtime.optim import accumulated_step, warmup_constant_decay
from distill.runtime.run import Run
from distill.teacher.denoiser import DiffusersDenoiser, UNetDenoiser
from distill.teacher.folder import load_initial
from distill.teacher.multi_view import MultiViewUNet, ViewConditionOptions
from distill.teacher.view_training import DenoisingBatch, ImageBatches, ViewBatches, ViewTrainingOptions

LossTarget = Literal["target", "x0", "previous"]
SNAPSHOTS = "snapshots"  # in a run's directory: copies of the teacher during the training, by their step
Snapshot: TypeAlias = Callable[[int, Any], None]
COMPILED_SHAPES = 64  # of inputs, for which a kind of block is compiled anew


@dataclass(frozen=True)
class UnetOptions:
    """Size and training of the denoiser, and the noise schedule it is trained for."""

    channels: tuple[int, ...] = (64, 128)
    layers: int = 1
    heads: int = 4
    batch: int = 64
    accumulate: int = 1  # parts of the batch whose gradients are added up, for less memory
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1.5e-3  # constant until the last part of the training
    caption_dropout: float = 0.1  # from the first step on, for classifier-free guidance
    ema: float = 0.999
    decay: float = 0.25  # the last part of the training, in which the learning rate falls to 0
    decay_law: Literal["linear", "cosine"] = "linear"
    views: ViewTrainingOptions | None = None  # null: text alone; else the data must have poses and groups
    # flow_prediction: eps - x0 along the straight path (rectified flow, arXiv:2209.03003), without `schedule`
    prediction: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "v_prediction"
    # of beta over the timesteps: linear in sqrt(beta) or in beta, between the two below; or a squared cosine
    schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000
    # The squared error of the network's own target, of x0, or of the previous level's image, which is also
    # that of the difference from it
    loss: LossTarget = "target"
    zero_snr: bool = True  # rescale so that the last level is pure noise (Lin et al. 2023, arXiv:2305.08891)
    preview_guidance: float = 3.0
    snapshot_every: int | None = None  # steps between copies of the averaged network, each a whole teacher

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1:
            raise UserError(f"caption_dropout is {self.caption_dropout}: expected a fraction in [0, 1)")
        if not 0 < self.decay <= 1:
            raise UserError(f"decay is {self.decay}: expected a fraction in (0, 1] of the training")
        if not 0 < self.beta_start < self.beta_end < 1 or self.timesteps < 2:
            raise UserError(
                f"beta_start={self.beta_start:g}, beta_end={self.beta_end:g}, timesteps={self.timesteps}: "
                "expected rising numbers between 0 and 1, and at least 2 timesteps"
            )
        if self.loss != "target" and self.prediction == "epsilon":
            raise UserError(
                f"loss={self.loss}: at high noise x0 divides a prediction of eps by almost 0: give "
                "prediction=sample or v_prediction"
            )
        if self.snapshot_every is not None and self.snapshot_every < 1:
            raise UserError(f"snapshot_every is {self.snapshot_every}: expected steps, 1 or more, or null")
        processes.check_accumulate(self.accumulate, self.batch)
        if self.zero_snr and self.prediction == "epsilon":
            raise UserError(
                "prediction=epsilon is undefined at zero terminal SNR: use v_prediction, or zero_snr=false"
            )


def make_scheduler(options: UnetOptions) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """The schedule in diffusers' form; trailing spacing, so that sampling starts from the last level."""
    if options.prediction == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=options.timesteps)
    return DDIMScheduler(
        num_train_timesteps=options.timesteps,
        beta_start=options.beta_start,
        beta_end=options.beta_end,
        beta_schedule=options.schedule,
        prediction_type=options.prediction,
        rescale_betas_zero_snr=options.zero_snr,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # unused with trailing spacing; the stock pipeline warns at 0
    )


def build_unet(
    options: UnetOptions, latent_channels: int, side: int, text_width: int, image_dim: int | None = None
) -> UNet2DConditionModel:
    """An untrained denoiser with cross-attention on every level; with `options.views` one of views.

    image_dim: of CLIP's image embeddings, which such a one reads.
    """
    levels = len(options.channels)
    unet_class = UNet2DConditionModel if options.views is None else MultiViewUNet
    unet = unet_class(
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
    )
    if options.views is not None:
        unet.add_view_conditions(ViewConditionOptions(options.views.width, image_dim))
    return unet.to(memory_format=torch.channels_last)


def check_initial(unet: UNet2DConditionModel, options: UnetOptions) -> None:
    """Raise `UserError` where a U-Net to start from has other sizes than the options, which names its own."""
    own = {
        "channels": list(unet.config.block_out_channels),
        "layers": unet.config.layers_per_block,
        "heads": unet.config.attention_head_dim,
        "views": "{}" if isinstance(unet, MultiViewUNet) else "null",
    }
    given = {
        "channels": list(options.channels),
        "layers": options.layers,
        "heads": options.heads,
        "views": "null" if options.views is None else "{}",
    }
    differing = [f"'teacher.unet.{key}={value}'" for key, value in own.items() if value != given[key]]
    if differing:
        raise UserError(f"the initial U-Net has other sizes than the options: give {' '.join(differing)}")


def train_unet(
    run: Run,
    cache: LatentCache,
    vae: AutoencoderKL,
    options: UnetOptions,
    initial: UNet2DConditionModel | None = None,
    labels: ViewLabels | None = None,
    snapshot: Snapshot | None = None,
) -> UNet2DConditionModel:
    """Train on cached latents; returns the EMA weights in evaluation mode.

    `initial` is a trained U-Net of the same size to start from; `labels` are needed by `options.views`.
    snapshot: as of `train_denoiser`.
    """
    scheduler = ode_scheduler(make_scheduler(options))
    shape, width = cache.latents.shape[1:], cache.conditioning.embedding.shape[-1]
    image_dim = None if labels is None else labels.image_embedding.shape[-1]

    def build() -> UNetDenoiser:
        unet = build_unet(options, shape[0], shape[-1], width, image_dim).to(run.device)
        return UNetDenoiser(unet, *parameterisation(scheduler))

    denoiser = build()
    if initial is not None:
        load_initial(denoiser.network, initial, "U-Net")
    averaged = build()
    decode_latents = partial(decode, vae)
    train_denoiser(run, cache, options, denoiser, averaged, decode_latents, labels, snapshot)
    return averaged.network


def train_denoiser(
    run: Run,
    cache: LatentCache,
    options: UnetOptions,
    denoiser: DiffusersDenoiser,
    averaged: DiffusersDenoiser,
    decode_latents: Callable[[Tensor], Tensor],
    labels: ViewLabels | None = None,
    snapshot: Snapshot | None = None,
) -> None:
    """Train a denoiser of any family on cached latents; `averaged`, of the same size, takes its EMA weights.

    decode_latents: to images (B, 3, H, W) in [0, 1], of previews. snapshot: called every
    `options.snapshot_every` steps, by one process, with the steps done and the averaged network.
    """
    scheduler = ode_scheduler(make_scheduler(options))
    device, generator = run.data_device(cache.latents.nbytes)
    batches = make_batches(
        cache.to(device), None if labels is None else labels.to(device), options, run.options.seed
    )

    unet = denoiser.network
    averaged.eval().requires_grad_(False)
    if run.options.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if run.options.compile == "on":  # auto: no; on an H200 compiled blocks took 1.2 times as long
        compile_blocks(unet)
    ema = EMA(unet, options.ema)
    optimizer = make_optimizer(unet, options)
    lr_schedule = warmup_constant_decay(
        optimizer, run.options.steps, decay=options.decay, law=options.decay_law
    )
    run.track(model=unet, optimizer=optimizer, schedule=lr_schedule, ema=ema)

    previewed = cache.conditioning.select(torch.arange(32) * cache.num_captions // 32).to(run.device)
    shape = len(previewed), *cache.latents.shape[1:]
    preview_noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for step in run.steps():
        times = denoiser.schedule.num_train_timesteps
        parts = batches.draw(step, generator, times, options.caption_dropout)
        losses = local_losses(run, denoiser, parts, options.accumulate, options.loss)
        loss = accumulated_step(optimizer, losses, max_norm=1.0, scaler=run.scaler)
        lr_schedule.step()
        ema.update()
        run.log(loss=loss)

        if run.due(run.options.preview_every):
            ema.copy_to(averaged.network)
            model = Guided(averaged, cache.uncond.to(run.device), options.preview_guidance)
            with run.precision.autocast():
                samples = sample_ode(model, scheduler, previewed, preview_noise.to(run.device), 25)
            run.preview("samples", decode_latents(samples))
        if snapshot is not None and options.snapshot_every and run.due(options.snapshot_every):
            ema.copy_to(averaged.network)
            if run.main:
                snapshot(step + 1, averaged.network)
    ema.copy_to(averaged.network)


def compile_blocks(unet: nn.Module) -> None:
    """Compile the residual and the transformer blocks, of which all of one kind share their code.

    Faster to compile than the whole network, once for each of the shapes of a batch's parts.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_SHAPES)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D | BasicTransformerBlock):
            module.compile(dynamic=False)


def make_optimizer(unet: nn.Module, options: UnetOptions) -> Optimizer:
    """The optimizer that `options` name, over all parameters."""
    if options.optimizer == "muon":
        return Muon(unet.parameters(), options.learning_rate)
    return torch.optim.AdamW(unet.parameters(), options.learning_rate, weight_decay=0.01, fused=True)


def make_batches(
    cache: LatentCache, labels: ViewLabels | None, options: UnetOptions, seed: int
) -> "ImageBatches | ViewBatches":
    """The batches that `options` ask for. Raises `UserError` where the data has no views."""
    if options.views is None:
        return ImageBatches(cache, options.batch, seed)
    if labels is None:
        raise UserError("the data has no columns pose and group: set teacher.unet.views=null")
    return ViewBatches(cache, labels, options.views, options.batch, seed)


def local_losses(
    run: Run,
    denoiser: DiffusersDenoiser,
    parts: Sequence[DenoisingBatch],
    accumulate: int,
    loss_of: LossTarget = "target",
) -> Iterator[Tensor]:
    """The weighted losses of this process's rows of a batch, all parts of it in each of `accumulate`."""
    total = sum(len(part.t) for part in parts)
    rows = [processes.local_rows(len(part.t), accumulate, part.conditioning.views) for part in parts]
    for index in range(accumulate):
        losses = []
        for part, parts_of_rows in zip(parts, rows, strict=True):
            for local in parts_of_rows[index : index + 1]:
                with run.precision.autocast():
                    loss = denoising_loss(denoiser, part.select(local.rows), run.device, loss_of)
                losses.append(local.weight * len(part.t) / total * loss)
        if losses:
            yield torch.stack(losses).sum()


def denoising_loss(
    denoiser: DiffusersDenoiser, batch: DenoisingBatch, device: torch.device, loss_of: LossTarget = "target"
) -> Tensor:
    """The mean squared error of a part of a batch, on a device: of what `UnetOptions.loss` says.

    The mean of the previous level's image is linear in x0 and x_t, which is known: its error is that of x0
    times `NoiseSchedule.posterior_weight`, and so is the error of its difference from x_t.
    """
    latents, noise, t = (value.to(device) for value in batch[:3])
    conditioning = batch.conditioning.to(device)
    if loss_of == "target":
        return denoiser.denoising_loss(latents, noise, t, conditioning)
    x_t = denoiser.schedule.add_noise(latents, noise, t)
    error = (denoiser.predict(x_t, t, conditioning).x0 - latents).square().mean((1, 2, 3))
    weight = denoiser.schedule.posterior_weight(t) if loss_of == "previous" else torch.ones_like(error)
    return (weight.square() * error).mean()


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of scaled latents (B, C, h, w)."""
    return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
