"""What a teacher of pixels is conditioned on: columns of the data as rows of a network's input."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from distill.core.noise import NoiseSchedule, PredictionType
from distill.data.folders import CaptionedImages
from distill.runtime.errors import UserError
from distill.teacher.contexts import ContextDenoiser
from distill.teacher.denoiser import DiffusersDenoiser
from distill.teacher.pixel_networks import ClassChannelsUnet, ContextUnet
from distill.teacher.pixels import ClassDenoiser
from distill.teacher.unet import UnetOptions

MOST_CLASSES = 10_000  # a label beyond is taken for a mistake


class ConditionTable(NamedTuple):
    """What the images of a split are conditioned on.

    names: of classes, or of a context's numbers; rows (K + 1, 1, D), or (K + 1, C, h, w) of images: distinct
    conditions and, last, none at all; indices (N,): the row of each image.
    """

    names: list[str]
    rows: Tensor
    indices: Tensor


@dataclass(frozen=True)
class PixelCondition(ABC):
    """A kind of condition, the network that reads it, and how its teacher takes prompts."""

    column: str | None  # of the data's rows

    @property
    @abstractmethod
    def kind(self) -> str:
        """The `kind` in conditioning.json: that of a teacher in `distill.teacher.families`."""

    @abstractmethod
    def table(self, data: CaptionedImages) -> ConditionTable:
        """The conditions of a split. Raises `UserError` for rows that have none."""

    @abstractmethod
    def build(self, options: UnetOptions, channels: int, side: int, table: ConditionTable) -> nn.Module:
        """An untrained network on images of so many channels and pixels a side."""

    def denoiser(
        self, network: nn.Module, schedule: NoiseSchedule, prediction: PredictionType
    ) -> DiffusersDenoiser:
        """The network behind the protocol of all denoisers."""
        return ClassDenoiser(network, schedule, prediction)

    def save_facts(self, folder: Path) -> dict[str, Any]:
        """What conditioning.json says besides; what else prompts need is written into the folder."""
        return {}


@final
@dataclass(frozen=True)
class NoCondition(PixelCondition):
    """An unconditional model."""

    column: None = None

    @property
    def kind(self) -> str:
        """As of every condition."""
        return "none"

    def table(self, data: CaptionedImages) -> ConditionTable:
        """As of every condition."""
        return ConditionTable([], torch.zeros(2, 1, 1), torch.zeros(len(data), dtype=torch.long))

    def build(self, options: UnetOptions, channels: int, side: int, table: ConditionTable) -> nn.Module:
        """As of every condition: a `UNet2DModel`."""
        return UNet2DModel(sample_size=side, in_channels=channels, out_channels=channels, **blocks(options))


@final
@dataclass(frozen=True)
class ClassCondition(PixelCondition):
    """The number of a class, by an embedding added to that of the time, or as input channels."""

    column: str = "label"  # of the classes in the rows, numbers from 0 on
    channels: int | None = None  # of the input that carry the class; null: added to the time's embedding

    @property
    def kind(self) -> str:
        """As of every condition."""
        return "class"

    def table(self, data: CaptionedImages) -> ConditionTable:
        """As of every condition; the class after those of the data is that of no label."""
        names = class_names(data, self.column)
        numbers = torch.arange(len(names) + 1, dtype=torch.float32)[:, None, None]
        return ConditionTable(names, numbers, torch.tensor([row[self.column] for row in data.rows]))

    def build(self, options: UnetOptions, channels: int, side: int, table: ConditionTable) -> nn.Module:
        """As of every condition: a `UNet2DModel`, or a `ClassChannelsUnet` with one inside."""
        classes, sizes = len(table.rows), blocks(options)
        if self.channels is not None:
            return ClassChannelsUnet(side, channels, classes, self.channels, sizes)
        return UNet2DModel(
            sample_size=side, in_channels=channels, out_channels=channels, num_class_embeds=classes, **sizes
        )


@final
@dataclass(frozen=True)
class ContextCondition(PixelCondition):
    """A number for each of some names, or whether each is true: context vectors, attributes."""

    column: str = "context"  # a mapping from names to numbers, or to true and false
    # channels at the finest level of a `ContextUnet`; null: a U-Net of diffusers
    context_unet: int | None = None

    @property
    def kind(self) -> str:
        """As of every condition."""
        return "context"

    def table(self, data: CaptionedImages) -> ConditionTable:
        """As of every condition; no condition is all zeros."""
        names = context_names(data, self.column)
        vectors = torch.tensor([[float(row[self.column][name]) for name in names] for row in data.rows])
        distinct, index = vectors.unique(dim=0, return_inverse=True)
        return ConditionTable(names, torch.cat([distinct, torch.zeros(1, len(names))])[:, None], index)

    def build(self, options: UnetOptions, channels: int, side: int, table: ConditionTable) -> nn.Module:
        """As of every condition: a `UNet2DConditionModel` without attention to tokens, or a `ContextUnet`."""
        size = table.rows.shape[-1]
        if self.context_unet is not None:
            return ContextUnet(side, channels, channels, self.context_unet, size, options.timesteps)
        return vector_unet(options, channels, side, size)

    def denoiser(
        self, network: nn.Module, schedule: NoiseSchedule, prediction: PredictionType
    ) -> DiffusersDenoiser:
        """As of every condition."""
        return ContextDenoiser(network, schedule, prediction)


def vector_unet(options: UnetOptions, channels: int, side: int, size: int) -> UNet2DConditionModel:
    """An untrained U-Net without attention to tokens, which reads a vector of so many numbers."""
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        mid_block_type="UNetMidBlock2D",
        class_embed_type="projection",
        projection_class_embeddings_input_dim=size,
        **blocks(options),
    )


def blocks(options: UnetOptions) -> dict[str, Any]:
    """The arguments of diffusers' U-Nets in which all conditions agree; attention at the coarsest level."""
    levels = len(options.channels)
    return {
        "block_out_channels": options.channels,
        "down_block_types": ("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        "layers_per_block": options.layers,
        "attention_head_dim": options.channels[-1] // options.heads,
        "norm_num_groups": 16,
    }


def class_names(data: CaptionedImages, column: str) -> list[str]:
    """A name of each class from 0 on: the caption that all of its images share, else its number.

    Raises `UserError` for rows without a label, or with one that is no class.
    """
    captions: dict[int, set[str]] = {}
    for row in data.rows:
        value = row.get(column)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MOST_CLASSES:
            raise UserError(
                f"{row['file_name']} has the {column} {value!r}: expected a class, a number from 0 on"
            )
        captions.setdefault(value, set()).add(row["text"])
    texts = [captions.get(number, set()) for number in range(max(captions) + 1)]
    names = [next(iter(text)) if len(text) == 1 else str(number) for number, text in enumerate(texts)]
    return names if len(set(names)) == len(names) else [str(number) for number in range(len(names))]


def context_names(data: CaptionedImages, column: str) -> list[str]:
    """The names in the first row's context, which commas separate in prompts.

    Raises `UserError` for a row with other names, for values that are no numbers, and names with commas.
    """
    names: Sequence[str] = ()
    for row in data.rows:
        value = row.get(column)
        if not isinstance(value, Mapping) or not value:
            raise UserError(
                f"{row['file_name']} has the {column} {value!r}: expected a mapping from names to numbers"
            )
        names = names or list(value)
        if list(value) != list(names):
            raise UserError(
                f"{row['file_name']} has the {column} of {', '.join(value)}: expected {', '.join(names)}, as "
                "the first row"
            )
        comma = next((name for name in value if "," in name), None)
        if comma is not None:
            raise UserError(f"{row['file_name']}: {column} has the name {comma!r}: names are without commas")
        wrong = next((name for name, number in value.items() if not isinstance(number, int | float)), None)
        if wrong is not None:
            raise UserError(f"{row['file_name']}: {column}.{wrong} is {value[wrong]!r}: expected a number")
    return list(names)
