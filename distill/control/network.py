"""Denoising networks whose intermediate activations frozen adapters add to.

Zhang, Rao, Agrawala 2023, arXiv:2302.05543: y = F(x; frozen) + Z(F(x + Z(c); copy)), section 3.1.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule
from distill.runtime.errors import UserError

AdapterNetwork: TypeAlias = ModelMixin


@dataclass(frozen=True)
class Control:
    """An adapter with its images (N, 3, H, W) in [0, 1], its weight, and its range of the denoising.

    `start` and `end` are fractions of the denoising, which at time t is 1 - (t + 1) / T, as in
    `StableDiffusionControlNetPipeline`. A batch of k N samples, as of guidance, repeats the images.
    """

    adapter: AdapterNetwork
    images: Tensor
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise UserError(
                f"a control from {self.start} to {self.end}: "
                "expected fractions of the denoising, 0 <= start < end <= 1"
            )

    @property
    def always(self) -> bool:
        """Whether its range is the whole denoising."""
        return self.start == 0 and self.end == 1

    def weights(self, t: Tensor, num_train_timesteps: int) -> Tensor:
        """The weight (B, 1, 1, 1) at times t (B,): 0 outside its range."""
        fraction = 1 - (t + 1).double() / num_train_timesteps
        active = (fraction >= self.start - 1e-6) & (fraction < self.end - 1e-6)
        return (self.weight * active).float()[:, None, None, None]

    def residuals(self, x_t: Tensor, t: Tensor, inputs: Mapping[str, Any]) -> list[Tensor]:
        """What a U-Net's adapter adds to the skips and, last, to the middle block at times t (B,).

        inputs: what else it reads, in its own dtype where that is of floats.
        """
        dtype = self.adapter.dtype

        def cast(value: Any) -> Any:
            floats = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floats else value

        images = self.repeated(self.images, len(x_t)).to(x_t.device, dtype)
        output = self.adapter(x_t.to(dtype), t, controlnet_cond=images, **tree_map(cast, dict(inputs)))
        return [*output.down_block_res_samples, output.mid_block_res_sample]

    def repeated(self, values: Tensor, count: int) -> Tensor:
        """Values (N, C, h, w) of the images, such as themselves, for a batch of `count`.

        Raises `UserError` where count is not a multiple of their number.
        """
        if count % len(values):
            raise UserError(
                f"{len(values)} control images for a batch of {count}: expected one, or one a sample"
            )
        return values.repeat(count // len(values), 1, 1, 1)


class ControlledNetwork(nn.Module):
    """A denoising network with controls, called as it is, and equal to it bit for bit where none is active.

    The controls are no part of the module: its parameters, a copy and a LoRA are the network's alone, and a
    copy shares the adapters.
    """

    def __init__(self, network: Any, schedule: NoiseSchedule, controls: Sequence[Control]) -> None:
        super().__init__()
        self.network, self.schedule, self.controls = network, schedule, list(controls)
        self.config = network.config

    def __deepcopy__(self, memo: dict[int, Any]) -> "ControlledNetwork":
        copied = copy.copy(self)
        copied._modules = {"network": copy.deepcopy(self.network, memo)}
        return copied

    @property
    def dtype(self) -> torch.dtype:
        """That of the network."""
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        """That of the network."""
        return self.network.device

    @property
    def peft_config(self) -> Mapping[str, Any]:
        """The network's LoRAs by name; empty without any."""
        return getattr(self.network, "peft_config", {})

    def add_adapter(self, config: Any, adapter_name: str) -> None:
        """Add a LoRA to the network."""
        self.network.add_adapter(config, adapter_name=adapter_name)

    def delete_adapters(self, adapter_name: str) -> None:
        """Delete a LoRA of the network."""
        self.network.delete_adapters(adapter_name)

    def enable_adapters(self) -> None:
        """Activate the network's LoRA."""
        self.network.enable_adapters()

    def disable_adapters(self) -> None:
        """Deactivate the network's LoRA."""
        self.network.disable_adapters()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the network's activations in the backward pass."""
        self.network.enable_gradient_checkpointing()

    def weighted_sum(self, t: Tensor, call: Callable[[Control], Sequence[Tensor]], dims: int) -> list[Tensor]:
        """Sums over the controls of what their adapters return at times t (B,), by their weights.

        Empty where no control is active. dims: the number of dimensions of what they return.
        """
        total: list[Tensor] = []
        for control in self.controls:
            weights = control.weights(t, self.schedule.num_train_timesteps).to(t.device)
            if not control.always and not weights.any():  # only a range waits for the device
                continue
            weights = weights.view(-1, *(1,) * (dims - 1))
            weighted = [value * weights.to(value.dtype) for value in call(control)]
            total = [a + b for a, b in zip(total, weighted, strict=True)] if total else weighted
        return [value.to(self.dtype) for value in total]


@final
class ControlledUnet(ControlledNetwork):
    """A U-Net whose skips and middle block adapters add to."""

    def view_conditions(self, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
        """A multi-view U-Net's arguments, and the text that its adapters, which know no cameras, read."""
        return {**self.network.view_conditions(conditioning, dtype), "text": conditioning.embedding}

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor | None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        text: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> UNet2DConditionOutput:
        """x_t (B, C, h, w), t (B,), text embeddings (B, L, D), features (B, F) of a guidance scale.

        added_cond_kwargs: pooled embeddings and time ids of Stable Diffusion XL, or a pose's embedding.
        encoder_attention_mask, cross_attention_kwargs: of a multi-view U-Net. text: the embeddings that
        adapters read, where they are others than the U-Net's. class_labels: of a U-Net of pixels.
        """
        inputs = {
            "encoder_hidden_states": encoder_hidden_states,
            "timestep_cond": timestep_cond,
            "added_cond_kwargs": added_cond_kwargs,
            "encoder_attention_mask": encoder_attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs,
            "class_labels": class_labels,
        }
        read_by_adapters = {
            "encoder_hidden_states": encoder_hidden_states if text is None else text,
            "class_labels": class_labels,
            "added_cond_kwargs": added_cond_kwargs,
        }

        added = self.weighted_sum(t, lambda control: control.residuals(x_t, t, read_by_adapters), x_t.ndim)
        if not added:
            return self.network(x_t, t, **inputs)
        *down, middle = added
        return self.network(
            x_t,
            t,
            **inputs,
            down_block_additional_residuals=tuple(down),
            mid_block_additional_residual=middle,
        )
