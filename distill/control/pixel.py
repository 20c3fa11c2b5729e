"""Adapters of `UNet2DModel`, a U-Net on pixels that knows classes: diffusers' `ControlNetModel` copies
text-conditional U-Nets alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding, ControlNetOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from distill.control.network import ControlledNetwork
from distill.runtime.errors import UserError

CONDITION_CHANNELS = 16  # of the convolutions that read a condition image


@final
class PixelControlNet(ModelMixin, ConfigMixin):
    """The encoder half of a `UNet2DModel`, its condition encoder and zero convolutions.

    Its output is that of diffusers' `ControlNetModel` (arXiv:2302.05543, section 3.1).
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, unet: dict[str, Any]) -> None:
        """unet: the arguments of the `UNet2DModel`."""
        super().__init__()
        network = UNet2DModel(**unet)
        self.conv_in, self.time_proj = network.conv_in, network.time_proj
        self.time_embedding, self.class_embedding = network.time_embedding, network.class_embedding
        self.down_blocks, self.mid_block = network.down_blocks, network.mid_block
        stem = network.conv_in.out_channels
        self.condition = ControlNetConditioningEmbedding(stem, block_out_channels=(CONDITION_CHANNELS,))
        widths = [stem]
        for block in self.down_blocks:
            width = block.resnets[-1].out_channels
            widths += [width] * (len(block.resnets) + (block.downsamplers is not None))
        self.zero_down = nn.ModuleList(_zero_convolution(width) for width in widths)
        self.zero_mid = _zero_convolution(widths[-1])

    def forward(
        self, sample: Tensor, timestep: Tensor, controlnet_cond: Tensor, class_labels: Tensor | None = None
    ) -> ControlNetOutput:
        """What is added to the skips and to the middle block.

        sample (B, C, H, W), timestep (B,), condition images (B, 3, H, W) in [0, 1], class_labels (B,).
        """
        embedding = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels)
        features = self.conv_in(sample) + self.condition(controlnet_cond)
        skips = [features]
        for block in self.down_blocks:
            features, more = block(features, embedding)
            skips += more
        features = self.mid_block(features, embedding)
        added = [zero(skip) for zero, skip in zip(self.zero_down, skips, strict=True)]
        return ControlNetOutput(tuple(added), self.zero_mid(features))


def _zero_convolution(channels: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, channels, 1)
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return convolution


def make_pixel_adapter(network: UNet2DModel) -> PixelControlNet:
    """An untrained adapter of a network. Raises `UserError` for one whose encoder half is not the usual."""
    config = dict(network.config)
    usual = config["time_embedding_type"] == "positional" and config["class_embed_type"] is None
    skips = any(hasattr(block, "skip_conv") for block in network.down_blocks)
    if not usual or skips or config["center_input_sample"] or network.mid_block is None:
        raise UserError(
            "there are no adapters of a UNet2DModel with a Fourier or learned time, projected classes, skip "
            "blocks, centred input or no middle block"
        )
    adapter = PixelControlNet({name: value for name, value in config.items() if not name.startswith("_")})
    copied = {name: value for name, value in network.state_dict().items() if name in adapter.state_dict()}
    adapter.load_state_dict(copied, strict=False)
    return adapter


@final
class ControlledClassUnet(ControlledNetwork):
    """A `UNet2DModel` whose skips and middle block adapters add to."""

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        """x_t (B, C, H, W), t (B,), classes (B,) where the network has some."""
        inputs = {"class_labels": class_labels}
        added = self.weighted_sum(t, lambda control: control.residuals(x_t, t, inputs), x_t.ndim)
        if not added:
            return self.network(x_t, t, class_labels=class_labels)
        with _added(self.network, added[:-1], added[-1]):
            return self.network(x_t, t, class_labels=class_labels)


@contextmanager
def _added(network: UNet2DModel, skips: Sequence[Tensor], middle: Tensor) -> Iterator[None]:
    """Inside the block, what is added to the skips that its decoder half reads and to its middle block.

    By hooks, as `UNet2DModel` takes no residuals.
    """
    left = list(skips)

    def add_to_skips(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        features, own, *rest = inputs
        first = len(left) - len(own)
        own = tuple(skip + more for skip, more in zip(own, left[first:], strict=True))
        del left[first:]
        return features, own, *rest

    handles = [block.register_forward_pre_hook(add_to_skips) for block in network.up_blocks]
    handles.append(network.mid_block.register_forward_hook(lambda module, inputs, output: output + middle))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
