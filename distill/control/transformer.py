"""Adapters of flow matching transformers (Stable Diffusion 3, Flux), whose condition images the VAE encodes.

ControlNet (arXiv:2302.05543) as diffusers has it for transformers: a copy of the first blocks, whose outputs
are added to those of all blocks.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from diffusers import FluxControlNetModel, SD3ControlNetModel
from torch import Tensor

from distill.control.network import Control, ControlledNetwork
from distill.core.noise import NoiseSchedule
from distill.teacher.flow import FluxDenoiser

FRACTION = 0.5  # of the transformer's blocks, which a new adapter copies


class ControlledTransformer(ControlledNetwork):
    """A transformer with controls."""

    def __init__(
        self,
        network: Any,
        schedule: NoiseSchedule,
        controls: Sequence[Control],
        encode: Callable[[Tensor], Tensor],
        shift: float = 0.0,
    ) -> None:
        """encode: images (B, 3, H, W) in [0, 1] to the teacher's latents (B, C, h, w).

        shift: what it subtracts from all of them.
        """
        super().__init__(network, schedule, controls)
        self.encode, self.shift = encode, shift
        self._latents: dict[int, tuple[Tensor, Tensor]] = {}  # by adapter: images, and what they encode to

    def latents_of(self, control: Control) -> Tensor:
        """The latents of a control's images, which are encoded once."""
        images, latents = self._latents.get(id(control.adapter), (None, None))
        if images is not control.images or latents is None:
            with torch.no_grad():
                latents = self.encode(control.images.to(self.device))
            self._latents[id(control.adapter)] = (control.images, latents)
        return latents

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Any:
        """As the transformer's, in its own units; positions and guidance are Flux's."""
        own = {"img_ids": img_ids, "txt_ids": txt_ids, "guidance": guidance}
        inputs = {name: value for name, value in own.items() if value is not None}
        inputs |= {"encoder_hidden_states": encoder_hidden_states, "pooled_projections": pooled_projections}
        t = self.times(timestep) - 1  # of a control's range, which ends after the last time

        def call(control: Control) -> Sequence[Tensor]:
            latents = control.repeated(self.latents_of(control), len(hidden_states))
            return self.call_adapter(control.adapter, hidden_states, latents, timestep, inputs)

        added = self.weighted_sum(t, call, 3)
        residuals = self.residuals(added) if added else {}
        return self.network(hidden_states, timestep=timestep, **inputs, **residuals)

    @abstractmethod
    def times(self, timestep: Tensor) -> Tensor:
        """T s of the transformer's timesteps (B,)."""

    @abstractmethod
    def call_adapter(
        self,
        adapter: Any,
        hidden_states: Tensor,
        latents: Tensor,
        timestep: Tensor,
        inputs: dict[str, Tensor],
    ) -> Sequence[Tensor]:
        """The adapter's outputs (B, N, D), of latents (B, C, h, w) of its images."""

    @abstractmethod
    def residuals(self, added: Sequence[Tensor]) -> dict[str, Any]:
        """The transformer's arguments for what is added to its blocks."""


@final
class ControlledSD3(ControlledTransformer):
    """`SD3Transformer2DModel` with `SD3ControlNetModel`s."""

    def times(self, timestep: Tensor) -> Tensor:
        """As of every controlled transformer."""
        return timestep

    def call_adapter(
        self,
        adapter: Any,
        hidden_states: Tensor,
        latents: Tensor,
        timestep: Tensor,
        inputs: dict[str, Tensor],
    ) -> Sequence[Tensor]:
        """As of every controlled transformer.

        As `StableDiffusion3ControlNetPipeline`, which gives some adapters no pooled embedding, and latents
        that are not shifted, and those of SD 3.5 large embedded patches and no text.
        """
        own = {**inputs, "hidden_states": hidden_states, "controlnet_cond": latents}
        if adapter.config.force_zeros_for_pooled_projection:
            own["pooled_projections"] = torch.zeros_like(own["pooled_projections"])
            own["controlnet_cond"] = latents + self.shift
        if adapter.pos_embed is None:
            own["hidden_states"] = self.network.pos_embed(hidden_states)
        if adapter.context_embedder is None:
            del own["encoder_hidden_states"]
        own = {name: value.to(adapter.dtype) for name, value in own.items()}
        return adapter(timestep=timestep, return_dict=False, **own)[0]

    def residuals(self, added: Sequence[Tensor]) -> dict[str, Any]:
        """As of every controlled transformer."""
        return {"block_controlnet_hidden_states": list(added)}


@final
class ControlledFlux(ControlledTransformer):
    """`FluxTransformer2DModel` with `FluxControlNetModel`s."""

    def times(self, timestep: Tensor) -> Tensor:
        """As of every controlled transformer."""
        return timestep * self.schedule.num_train_timesteps

    def call_adapter(
        self,
        adapter: Any,
        hidden_states: Tensor,
        latents: Tensor,
        timestep: Tensor,
        inputs: dict[str, Tensor],
    ) -> Sequence[Tensor]:
        """As of every controlled transformer; first the outputs for the blocks of text and image."""
        dtype = adapter.dtype
        own = {name: value.to(dtype) for name, value in inputs.items()}
        if not adapter.config.guidance_embeds:
            own.pop("guidance", None)
        joint, single = adapter(
            hidden_states=hidden_states.to(dtype),
            controlnet_cond=FluxDenoiser.pack(latents.to(dtype)),
            timestep=timestep,
            return_dict=False,
            **own,
        )
        self._joint = len(joint)
        return [*joint, *(single or ())]

    def residuals(self, added: Sequence[Tensor]) -> dict[str, Any]:
        """As of every controlled transformer."""
        joint, single = added[: self._joint], added[self._joint :]
        return {
            "controlnet_block_samples": list(joint),
            "controlnet_single_block_samples": list(single) or None,
            "controlnet_blocks_repeat": True,  # as `FluxControlNetPipeline`
        }


def make_sd3_adapter(transformer: Any) -> SD3ControlNetModel:
    """A copy of the first blocks of a transformer of Stable Diffusion 3, and zero layers."""
    layers = max(round(FRACTION * transformer.config.num_layers), 1)
    config = {**transformer.config, "num_layers": layers, "extra_conditioning_channels": 0}
    config |= {"force_zeros_for_pooled_projection": False}
    # diffusers' from_transformer would change the transformer's own config
    adapter = SD3ControlNetModel.from_config(config)
    for name in ("pos_embed", "time_text_embed", "context_embedder"):
        getattr(adapter, name).load_state_dict(getattr(transformer, name).state_dict())
    adapter.transformer_blocks.load_state_dict(transformer.transformer_blocks.state_dict(), strict=False)
    for parameter in adapter.pos_embed_input.parameters():
        torch.nn.init.zeros_(parameter)
    return adapter


def make_flux_adapter(transformer: Any) -> FluxControlNetModel:
    """A copy of the first blocks of Flux's transformer, and zero layers."""
    config = transformer.config
    return FluxControlNetModel.from_transformer(
        transformer,
        num_layers=max(round(FRACTION * config.num_layers), 1),
        num_single_layers=round(FRACTION * config.num_single_layers),
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
    )
