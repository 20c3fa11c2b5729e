"""The U-Net denoiser: any network called as `diffusers.UNet2DConditionModel` is, behind the `Denoiser`
protocol.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule, PredictionType
from distill.core.teacher import GUIDANCE, Denoiser
from distill.core.views import REFERENCE
from distill.runtime.errors import UserError
from distill.teacher.multi_view import MultiViewUNet, with_reference_rows, without_reference_rows

LORA = "critic"  # the adapter's name inside peft
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]


def guidance_features(scale: Tensor, dim: int) -> Tensor:
    """Sines and cosines (B, dim) of 1000 (s - 1) for CFG scales s (B,), as diffusers' LCM pipelines."""
    return get_timestep_embedding(1000 * (scale.float() - 1), dim)


class _Reached(Exception):
    """The bottleneck has been computed; the decoder half is not needed."""


@final
class UNetDenoiser(Denoiser):
    """A U-Net in its own dtype; inputs are cast to it and outputs come back as float32.

    A copy or a LoRA to train has float32 weights, whatever the dtype of the frozen ones.
    """

    def __init__(
        self, network: Any, schedule: NoiseSchedule, prediction_type: PredictionType, lora: bool = False
    ) -> None:
        """network(x_t, t, encoder_hidden_states=...) must return an object with `sample`, and have
        `dtype`.
        """
        super().__init__(network, schedule, prediction_type)
        self.lora = lora

    def output(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """As of every denoiser; the embedding (B, L, D) is what the cross-attention reads.

        A multi-view network also reads cameras and a picture (`distill.core.views`).
        """
        if self.conditioned_on_views and REFERENCE in conditioning.extras:
            joined = self._evaluate(*with_reference_rows(x_t, t, conditioning))
            return without_reference_rows(joined, conditioning.views)
        return self._evaluate(x_t, t, conditioning)

    def _evaluate(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.network.dtype
        inputs: dict[str, Any] = {"encoder_hidden_states": conditioning.embedding.to(dtype)}
        if self.conditioned_on_views:
            inputs = self.network.view_conditions(conditioning, dtype)
        dim = self.network.config.time_cond_proj_dim if GUIDANCE in conditioning.extras else None
        if dim is not None:
            inputs["timestep_cond"] = guidance_features(conditioning.extras[GUIDANCE], dim).to(dtype)
        sample = self.network(x_t.to(dtype), t, **inputs).sample
        return sample.to(torch.promote_types(sample.dtype, torch.float32))

    @property
    def conditioned_on_views(self) -> bool:
        """Whether the network reads cameras, groups of views and pictures."""
        return isinstance(self.network, MultiViewUNet)

    @property
    def embedding_dim(self) -> int:
        """As of every denoiser."""
        return self.network.config.cross_attention_dim

    def trainable_copy(self) -> "UNetDenoiser":
        """As of every denoiser."""
        network = copy.deepcopy(self.network).float().requires_grad_(True)
        if LORA in getattr(network, "peft_config", {}):
            network.delete_adapters(LORA)
        return UNetDenoiser(network, self.schedule, self.prediction_type)

    def with_network(self, network: nn.Module) -> "UNetDenoiser":
        """Another network, such as this one with adapters, at the same schedule and parameterisation."""
        return UNetDenoiser(network, self.schedule, self.prediction_type)

    def with_lora(self, rank: int) -> "UNetDenoiser":
        """As of every denoiser; a network carries one LoRA at a time, and a new one replaces it.

        Raises `UserError` where peft is not installed.
        """
        try:
            from peft import LoraConfig
        except ImportError:
            raise UserError(
                "a LoRA critic needs peft: pip install peft, or set objective.critic.kind=copy"
            ) from None
        if LORA in getattr(self.network, "peft_config", {}):
            self.network.delete_adapters(LORA)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS, init_lora_weights=True)
        self.network.add_adapter(config, adapter_name=LORA)
        self.network.disable_adapters()
        denoiser = UNetDenoiser(self.network, self.schedule, self.prediction_type, lora=True)
        for parameter in denoiser.trainable_parameters():
            parameter.data = parameter.data.float()  # peft has cast it to the dtype of the frozen weights
        return denoiser

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Those of the LoRA where there is one, else all."""
        named = self.network.named_parameters()
        return [value for name, value in named if not self.lora or f".{LORA}." in name]

    def enable_gradient_checkpointing(self) -> None:
        """As of every denoiser."""
        self.network.enable_gradient_checkpointing()

    @contextmanager
    def adapter_enabled(self) -> Iterator[None]:
        """The LoRA is active and trainable inside the block only; a backward pass must be inside too."""
        if not self.lora:
            yield
            return
        self.network.enable_adapters()
        try:
            yield
        finally:
            self.network.disable_adapters()

    def with_guidance_embedding(self, dim: int) -> "UNetDenoiser":
        """As of every denoiser; the new layer is zero at first, as LCM initialises it (section 4.2)."""
        embedding = self.network.time_embedding
        width = embedding.linear_1.in_features
        embedding.cond_proj = nn.utils.skip_init(
            nn.Linear, dim, width, bias=False, device=self.network.device
        )
        nn.init.zeros_(embedding.cond_proj.weight)
        self.network.register_to_config(time_cond_proj_dim=dim)
        return self

    @torch.no_grad()
    def as_x0_predictor(self, t: int) -> "UNetDenoiser":
        """As of every denoiser: a v predictor's last layer times -sigma(t), which is x0 where alpha(t) is
        0.
        """
        if self.prediction_type == "sample":
            return self
        if self.prediction_type != "v_prediction":
            raise UserError(
                "parameterisation=sample needs a teacher that predicts v or x0: this one predicts eps"
            )
        sigma = float(self.schedule.sigma(torch.tensor([t])))
        for value in self.network.conv_out.parameters():
            value.mul_(-sigma)
        return UNetDenoiser(self.network, self.schedule, "sample")

    def mid_block_features(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """As of every denoiser; the decoder half is not evaluated."""
        features: list[Tensor] = []

        def stop(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            features.append(output)
            raise _Reached

        handle = self.network.mid_block.register_forward_hook(stop)
        try:
            self.output(x_t, t, conditioning)
        except _Reached:
            pass
        finally:
            handle.remove()
        return features[0].float()

    @contextmanager
    def capture_mid_block(self) -> Iterator[list[Tensor]]:
        """Collect the bottleneck activations of every call inside the block."""
        features: list[Tensor] = []
        handle = self.network.mid_block.register_forward_hook(
            lambda module, inputs, output: features.append(output.float())
        )
        try:
            yield features
        finally:
            handle.remove()
