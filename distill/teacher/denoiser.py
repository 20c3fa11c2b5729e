"""Networks of diffusers behind the `Denoiser` protocol; among them the U-Net of Stable Diffusion."""

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from distill.core.conditioning import POOLED, TIME_IDS, Conditioning
from distill.core.noise import NoiseSchedule, PredictionType, to_flow
from distill.core.teacher import GUIDANCE, INTERVAL_START, Denoiser
from distill.core.views import REFERENCE
from distill.runtime.errors import UserError
from distill.runtime.sharding import is_sharded
from distill.teacher.multi_view import MultiViewUNet, with_reference_rows, without_reference_rows

LORA = "critic"  # the adapter's name inside peft
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]


def guidance_features(scale: Tensor, dim: int) -> Tensor:
    """Sines and cosines (B, dim) of 1000 (s - 1) for CFG scales s (B,), as diffusers' LCM pipelines."""
    return get_timestep_embedding(1000 * (scale.float() - 1), dim)


def interval_features(start: Tensor, dim: int) -> Tensor:
    """Sines (B, dim) of k pi r / 2 of starts r (B,) in [0, 1], k from 1 on: all are 0 at 0."""
    return (start[:, None] * torch.arange(1, dim + 1, device=start.device) * (math.pi / 2)).sin()


class _Reached(Exception):
    """The bottleneck has been computed; the decoder half is not needed."""


class DiffusersDenoiser(Denoiser):
    """A network of diffusers in its own dtype; inputs are cast to it and outputs come back as float32.

    A copy or a LoRA to train has float32 weights, whatever the dtype of the frozen ones. Families say how
    their network is called, and which of its modules is the bottleneck.
    """

    def __init__(
        self, network: Any, schedule: NoiseSchedule, prediction_type: PredictionType, lora: bool = False
    ) -> None:
        """network: a module with `dtype`, `config` and, for a LoRA, diffusers' methods of adapters."""
        super().__init__(network, schedule, prediction_type)
        self.lora = lora

    def output(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """As of every denoiser."""
        output = self.call_network(*self.network_input(x_t, t), conditioning)
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What a network takes for x_t (B, C, h, w) at times (B,): that, or (1 - s) x0 + s eps and T s."""
        if self.prediction_type != "flow_prediction":
            return x_t, t
        x, time = to_flow(x_t, self.schedule.alpha(t), self.schedule.sigma(t))
        return x, self.schedule.num_train_timesteps * time.flatten()

    @abstractmethod
    def call_network(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output (B, C, h, w), in its dtype, for its own input and timesteps (B,)."""

    @property
    @abstractmethod
    def bottleneck(self) -> nn.Module:
        """The module whose activations a discriminator reads."""

    def bottleneck_features(self, output: Any) -> Tensor:
        """Activations (B, D, h, w) of what the bottleneck returned."""
        return output

    @property
    def conditioned_on_views(self) -> bool:
        """Whether the network reads cameras, groups of views and pictures."""
        return False

    @property
    def lora_targets(self) -> list[str]:
        """The names of the layers that a LoRA changes."""
        return LORA_TARGETS

    def with_network(self, network: nn.Module, lora: bool = False) -> "DiffusersDenoiser":
        """Another network, such as this one with adapters, at the same schedule and parameterisation."""
        return type(self)(network, self.schedule, self.prediction_type, lora)

    def trainable_copy(self) -> "DiffusersDenoiser":
        """As of every denoiser."""
        network = copy.deepcopy(self.network).float().requires_grad_(True)
        if LORA in getattr(network, "peft_config", {}):
            network.delete_adapters(LORA)
        return self.with_network(network)

    def with_lora(self, rank: int) -> "DiffusersDenoiser":
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
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=self.lora_targets, init_lora_weights=True)
        self.network.add_adapter(config, adapter_name=LORA)
        self.network.disable_adapters()
        denoiser = self.with_network(self.network, lora=True)
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

    def mid_block_features(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """As of every denoiser; what follows the bottleneck is not evaluated.

        A sharded network is evaluated to its end, where it drops what it has gathered.
        """
        if is_sharded(self.network):
            with self.capture_mid_block() as captured:
                self.output(x_t, t, conditioning)
            return captured[0]
        features: list[Tensor] = []

        def stop(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            features.append(self.bottleneck_features(output))
            raise _Reached

        handle = self.bottleneck.register_forward_hook(stop)
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
        handle = self.bottleneck.register_forward_hook(
            lambda module, inputs, output: features.append(self.bottleneck_features(output).float())
        )
        try:
            yield features
        finally:
            handle.remove()


@final
class UNetDenoiser(DiffusersDenoiser):
    """`diffusers.UNet2DConditionModel`, or what is called as it is: a multi-view or a controlled U-Net."""

    def call_network(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """As of every denoiser; the embedding (B, L, D) is what the cross-attention reads.

        A multi-view network also reads cameras and a picture (`distill.core.views`), Stable Diffusion XL's
        the pooled embedding and the time ids. A predicted variance (DeepFloyd IF) is left out.
        """
        if self.conditioned_on_views and REFERENCE in conditioning.extras:
            joined = self._evaluate(*with_reference_rows(x, timestep, conditioning))
            return without_reference_rows(joined, conditioning.views)
        return self._evaluate(x, timestep, conditioning)[:, : x.shape[1]]

    def _evaluate(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        dtype, extras = self.network.dtype, conditioning.extras
        inputs: dict[str, Any] = {"encoder_hidden_states": conditioning.embedding.to(dtype)}
        if self.conditioned_on_views:
            inputs = self.network.view_conditions(conditioning, dtype)
        if POOLED in extras:
            added = {"text_embeds": extras[POOLED].to(dtype), "time_ids": extras[TIME_IDS].to(dtype)}
            inputs["added_cond_kwargs"] = added
        dim = self.network.config.time_cond_proj_dim if GUIDANCE in extras else None
        if dim is not None:
            inputs["timestep_cond"] = guidance_features(extras[GUIDANCE], dim).to(dtype)
        if INTERVAL_START in extras:
            dim = self.network.config.time_cond_proj_dim
            inputs["timestep_cond"] = interval_features(extras[INTERVAL_START], dim).to(dtype)
        return self.network(x.to(dtype), timestep, **inputs).sample

    @property
    def conditioned_on_views(self) -> bool:
        """As of every denoiser of diffusers: true of a multi-view U-Net, with adapters too."""
        return isinstance(getattr(self.network, "network", self.network), MultiViewUNet)

    @property
    def bottleneck(self) -> nn.Module:
        """The U-Net's middle block."""
        return self.network.mid_block

    @property
    def embedding_dim(self) -> int:
        """As of every denoiser."""
        return self.network.config.cross_attention_dim

    def add_interval_start(self, features: int) -> None:
        """As of every denoiser; the new layer is zero at first."""
        if hasattr(self.network, "add_time_condition"):
            self.network.add_time_condition(features)
        else:
            self.with_guidance_embedding(features)

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

    def limit_time_frequency(self, highest: float) -> None:
        """As of every denoiser: the sinusoids above count as 0, and so do the weights that read them."""
        network = self.network
        if hasattr(network, "limit_time_frequency"):
            network.limit_time_frequency(highest)
            return
        half, shift = network.time_proj.num_channels // 2, network.time_proj.downscale_freq_shift
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / (half - shift))
        mask = (frequencies <= highest).repeat(2)
        layer = network.time_embedding.linear_1
        with torch.no_grad():  # so that a network that is saved needs no mask
            layer.weight.mul_(mask.to(layer.weight))
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * mask.to(inputs[0]),))

    @torch.no_grad()
    def as_x0_predictor(self, t: int) -> "UNetDenoiser":
        """As of every denoiser: a v predictor's last layer times -sigma(t), which is x0 where alpha(t) is
        0.
        """
        if self.prediction_type == "sample":
            return self
        if self.prediction_type != "v_prediction":
            raise UserError(
                "parameterisation=sample needs a teacher that predicts v or x0: this one predicts "
                f"{self.prediction_type}"
            )
        sigma = float(self.schedule.sigma(torch.tensor([t])))
        for value in self.network.conv_out.parameters():
            value.mul_(-sigma)
        return UNetDenoiser(self.network, self.schedule, "sample")
