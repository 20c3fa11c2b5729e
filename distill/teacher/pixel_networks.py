"""Networks on pixels that diffusers lacks: a context that multiplies features, and classes as input channels.

Both are saved and called as diffusers' U-Nets are.
"""

from typing import Any, final

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two convolutions; the first one's output is added where the widths differ, else the input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(inputs, outputs), _convolution(outputs, outputs)
        self.same_width = inputs == outputs

    def forward(self, images: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W), divided by sqrt(2) so that the variance stays."""
        first = self.first(images)
        return ((images if self.same_width else first) + self.second(first)) / 2**0.5


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.GELU())


def _embedding(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


def _upsampling(inputs: int, outputs: int) -> nn.Sequential:
    blocks = ResidualBlock(outputs, outputs), ResidualBlock(outputs, outputs)
    return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 2, 2), *blocks)


@final
class ContextUnet(ModelMixin, ConfigMixin):
    """Two levels down to a global average and up again; on the way up, context times features plus time.

    The ContextUnet of "How Diffusion Models Work" (DeepLearning.AI, 2023), after M. Pearce's conditional
    MNIST; with group in place of batch normalisation, which works with an EMA of the weights.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        in_channels: int = 3,
        out_channels: int = 3,
        width: int = 64,
        context_size: int = 5,
        num_train_timesteps: int = 1000,
    ) -> None:
        """sample_size: image side, a multiple of 4; width: channels of the finest level."""
        super().__init__()
        self.stem = ResidualBlock(in_channels, width)
        self.down = nn.ModuleList(
            nn.Sequential(ResidualBlock(inputs, outputs), ResidualBlock(outputs, outputs), nn.MaxPool2d(2))
            for inputs, outputs in ((width, width), (width, 2 * width))
        )
        side = sample_size // 4
        self.mid_block = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.GELU(),
            nn.ConvTranspose2d(2 * width, 2 * width, side, side),
            nn.GroupNorm(8, 2 * width),
            nn.ReLU(),
        )
        widths = 2 * width, width
        self.times = nn.ModuleList(_embedding(1, size) for size in widths)
        self.contexts = nn.ModuleList(_embedding(context_size, size) for size in widths)
        self.up = nn.ModuleList((_upsampling(4 * width, width), _upsampling(2 * width, width)))
        self.out = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, out_channels, 3, padding=1),
        )

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: None = None, *, class_labels: Tensor
    ) -> UNet2DOutput:
        """The output (B, C, H, W) for images of the same shape, timesteps (B,) and contexts (B, K)."""
        stem = self.stem(sample)
        skips = [self.down[0](stem)]
        skips.append(self.down[1](skips[0]))
        time = (timestep.to(sample.dtype) / self.config.num_train_timesteps)[:, None]
        features = self.mid_block(skips[1])
        for level in range(2):
            context = self.contexts[level](class_labels.to(sample.dtype))[:, :, None, None]
            merged = context * features + self.times[level](time)[:, :, None, None]
            features = self.up[level](torch.cat([merged, skips[1 - level]], 1))
        return UNet2DOutput(sample=self.out(torch.cat([features, stem], 1)))


@final
class ClassChannelsUnet(ModelMixin, ConfigMixin):
    """`UNet2DModel` whose class is a learned vector, repeated over the image as further input channels.

    As in unit 2 of Hugging Face's diffusion course.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        in_channels: int = 1,
        num_class_embeds: int = 11,
        class_channels: int = 4,
        blocks: dict[str, Any] | None = None,
    ) -> None:
        """blocks: further arguments of `UNet2DModel`."""
        super().__init__()
        self.class_vectors = nn.Embedding(num_class_embeds, class_channels)
        channels = {"in_channels": in_channels + class_channels, "out_channels": in_channels}
        self.unet = UNet2DModel(sample_size=sample_size, **channels, **(blocks or {}))

    @property
    def mid_block(self) -> nn.Module:
        """The U-Net's."""
        return self.unet.mid_block

    def forward(self, sample: Tensor, timestep: Tensor, *, class_labels: Tensor) -> UNet2DOutput:
        """The output (B, C, H, W) for images of the same shape, timesteps (B,) and classes (B,)."""
        vectors = self.class_vectors(class_labels)[:, :, None, None]
        maps = vectors.expand(-1, -1, *sample.shape[2:])
        return self.unet(torch.cat([sample, maps], 1), timestep)
