"""Flow matching transformers: Stable Diffusion 3 (arXiv:2403.03206) and Flux.

They predict eps - x0 along (1 - s) x0 + s eps; `FlowSchedule` gives the same path at unit variance, on which
every objective works unchanged.
"""

import math
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from distill.core.conditioning import POOLED, Conditioning
from distill.core.flow_scheduler import FlowScheduler, parameterisation
from distill.core.identity import TeacherIdentity
from distill.teacher.denoiser import DiffusersDenoiser
from distill.teacher.pipeline import LatentTeacher


class TransformerDenoiser(DiffusersDenoiser):
    """A transformer on patches; its bottleneck is the middle one of its joint blocks."""

    @property
    def lora_targets(self) -> list[str]:
        """The attention's layers."""
        return ["to_q", "to_k", "to_v", "to_out.0"]

    @property
    def embedding_dim(self) -> int:
        """As of every denoiser."""
        return self.network.config.joint_attention_dim

    @property
    def bottleneck(self) -> nn.Module:
        """The middle one of the blocks that read text and image."""
        blocks = self.network.transformer_blocks
        return blocks[len(blocks) // 2]

    def bottleneck_features(self, output: Any) -> Tensor:
        """The image's tokens as a square (B, D, h, w)."""
        _, tokens = output
        side = math.isqrt(tokens.shape[1])
        return tokens.transpose(1, 2).unflatten(2, (side, side))


@final
class SD3Denoiser(TransformerDenoiser):
    """`SD3Transformer2DModel`."""

    def call_network(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """As of every denoiser of diffusers."""
        dtype = self.network.dtype
        return self.network(
            x.to(dtype),
            encoder_hidden_states=conditioning.embedding.to(dtype),
            pooled_projections=conditioning.extras[POOLED].to(dtype),
            timestep=timestep,
        ).sample


@final
class FluxDenoiser(TransformerDenoiser):
    """`FluxTransformer2DModel`, on latents in patches of 2 x 2."""

    guidance = 3.5  # of a network with distilled guidance, FLUX.1-dev's default

    def call_network(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """As of every denoiser of diffusers."""
        dtype, height, width = self.network.dtype, x.shape[2] // 2, x.shape[3] // 2
        positions = torch.zeros(height, width, 3, dtype=dtype, device=x.device)
        positions[..., 1] = torch.arange(height, device=x.device)[:, None]
        positions[..., 2] = torch.arange(width, device=x.device)
        embedding, guidance = conditioning.embedding.to(dtype), None
        if self.network.config.guidance_embeds:
            guidance = torch.full((len(x),), self.guidance, device=x.device)
        output = self.network(
            self.pack(x.to(dtype)),
            encoder_hidden_states=embedding,
            pooled_projections=conditioning.extras[POOLED].to(dtype),
            timestep=timestep / self.schedule.num_train_timesteps,
            img_ids=positions.flatten(0, 1),
            txt_ids=torch.zeros(embedding.shape[1], 3, dtype=dtype, device=x.device),
            guidance=guidance,
        ).sample
        patches = output.unflatten(1, (height, width)).unflatten(3, (x.shape[1], 2, 2))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    @staticmethod
    def pack(latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as patches of 2 x 2, (B, h w / 4, 4 C)."""
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        patches = latents.unflatten(3, (width, 2)).unflatten(2, (height, 2))  # B C h 2 w 2
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class FluxScheduler(FlowScheduler):
    """Steps at equal distances in s, before the shift, as `FluxPipeline` gives them."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """As of every scheduler."""
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(device=device, sigmas=sigmas)


class FlowTeacher(LatentTeacher):
    """A pipeline of diffusers with a flow matching transformer."""

    denoiser: TransformerDenoiser
    denoiser_class: type[TransformerDenoiser]
    scheduler_class: type[FlowScheduler]  # spaces steps as the pipeline does

    def __init__(
        self, pipeline: Any, name_or_path: str = "", identity: TeacherIdentity | None = None
    ) -> None:
        """pipeline: its parts are frozen."""
        self.pipeline = pipeline
        config, tokens = pipeline.scheduler.config, (pipeline.default_sample_size // 2) ** 2
        scheduler = self.scheduler_class.from_config(config, **fixed_shift(config, tokens))
        denoiser = self.denoiser_class(pipeline.transformer, *parameterisation(scheduler))
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        encoders = [pipeline.components.get(name) for name in names]
        present = [encoder for encoder in encoders if encoder is not None]
        super().__init__(denoiser, scheduler, pipeline.vae, present, name_or_path, identity)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent at the pipeline's default size."""
        side = self.pipeline.default_sample_size
        return self.vae.config.latent_channels, side, side


def fixed_shift(config: Any, tokens: int) -> dict[str, Any]:
    """Changes to a scheduler's config that shifts by resolution: the shift exp(mu) of so many tokens.

    mu is linear in their number (`calculate_shift` of diffusers' pipelines).
    """
    if not config.use_dynamic_shifting:
        return {}
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    return {"use_dynamic_shifting": False, "shift": math.exp(mu)}


@final
class StableDiffusion3Teacher(FlowTeacher):
    """A `StableDiffusion3Pipeline`; without its T5 encoder, zeros stand in its place, as in diffusers."""

    denoiser_class, scheduler_class = SD3Denoiser, FlowScheduler

    def encode_new(self, prompts: list[str]) -> Conditioning:
        """The tokens of both CLIPs, then those of T5 (B, L, D), and the pooled embeddings (B, P)."""
        embedding, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False
        )
        return Conditioning(embedding, {POOLED: pooled})


@final
class FluxTeacher(FlowTeacher):
    """A `FluxPipeline`. Of FLUX.1-dev guidance is an input of the network; that of objectives is on top."""

    denoiser_class, scheduler_class = FluxDenoiser, FluxScheduler

    def encode_new(self, prompts: list[str]) -> Conditioning:
        """T5's tokens (B, L, D) and CLIP's pooled embedding (B, P)."""
        embedding, pooled, _ = self.pipeline.encode_prompt(prompts)
        return Conditioning(embedding, {POOLED: pooled})
