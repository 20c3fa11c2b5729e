"""Teachers of pixels that read an image beside the noisy one: super-resolution and inpainting.

By concatenation, as in latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.3) and Palette
(arXiv:2111.05826).
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from distill.core.conditioning import Conditioning
from distill.core.identity import TeacherIdentity
from distill.core.noise import NoiseSchedule, PredictionType
from distill.data.folders import PATH, CaptionedImages
from distill.data.images import is_image_file, load_image, read_image, read_pixels
from distill.runtime.errors import UserError
from distill.teacher.denoiser import DiffusersDenoiser
from distill.teacher.pixel_conditions import ConditionTable, PixelCondition, blocks
from distill.teacher.pixels import PixelTeacher
from distill.teacher.unet import UnetOptions

SMALLEST = 0.25  # of the sides of an unknown rectangle in training, as a fraction of the image's


@dataclass(frozen=True, kw_only=True)
class ImageCondition(PixelCondition):
    """A map (C, h, w) made of an image, enlarged to its size and concatenated to the noisy image.

    Its values are in [-1, 1], and all are 0 for no condition, as classifier-free guidance needs.
    """

    column: None = None

    @property
    @abstractmethod
    def channels(self) -> int:
        """C, for images of three channels, grey ones too."""

    @abstractmethod
    def maps_of(self, images: Tensor, rows: Tensor) -> Tensor:
        """Maps (B, C, h, w) of training images (B, 3, H, W) in [0, 1], which are `rows` (B,) of the data."""

    @abstractmethod
    def read(self, path: str, side: int) -> Tensor:
        """The map (C, h, w) of an image file, of a teacher of so many pixels a side."""

    def table(self, data: CaptionedImages) -> ConditionTable:
        """As of every condition: one of each image."""
        rows = torch.arange(len(data))
        maps = torch.cat([self.maps_of(data.composite(part), part).half() for part in rows.split(1024)])
        return ConditionTable([], torch.cat([maps, torch.zeros_like(maps[:1])]), rows)

    def build(self, options: UnetOptions, channels: int, side: int, table: ConditionTable) -> nn.Module:
        """As of every condition: a `UNet2DModel` with further input channels."""
        inputs = channels + self.channels
        return UNet2DModel(sample_size=side, in_channels=inputs, out_channels=channels, **blocks(options))

    def denoiser(
        self, network: nn.Module, schedule: NoiseSchedule, prediction: PredictionType
    ) -> DiffusersDenoiser:
        """As of every condition."""
        return ConcatenationDenoiser(network, schedule, prediction)


@final
@dataclass(frozen=True)
class LowResolutionCondition(ImageCondition):
    """The image itself, reduced: super-resolution."""

    factor: int = 4  # image side over that of the reduced image

    @property
    def kind(self) -> str:
        """As of every condition."""
        return "low_resolution"

    @property
    def channels(self) -> int:
        """As of every image condition."""
        return 3

    def save_facts(self, folder: Path) -> dict[str, Any]:
        """As of every condition."""
        return {"factor": self.factor}

    def maps_of(self, images: Tensor, rows: Tensor) -> Tensor:
        """As of every image condition. Raises `UserError` for a side that `factor` does not divide."""
        side = self._reduced_side(images.shape[-1])
        return 2 * F.interpolate(images, (side, side), mode="area") - 1

    def read(self, path: str, side: int) -> Tensor:
        """As of every image condition; a file of the reduced size is taken as it is."""
        reduced = self._reduced_side(side)
        if min(read_image(path).size) <= reduced:
            return 2 * load_image(path, reduced)[0] - 1
        return self.maps_of(load_image(path, side), torch.zeros(1))[0]

    def _reduced_side(self, side: int) -> int:
        if self.factor < 2 or side % self.factor:
            raise UserError(
                f"conditioning.factor is {self.factor}: expected a divisor of {side} pixels, 2 or more"
            )
        return side // self.factor


@final
@dataclass(frozen=True)
class InpaintingCondition(ImageCondition):
    """The image without a rectangle, and which pixels are known."""

    largest: float = 0.75  # of the sides of the random rectangles in training, as fractions of the image's

    def __post_init__(self) -> None:
        if not SMALLEST < self.largest <= 1:
            raise UserError(f"largest is {self.largest}: expected a fraction in ({SMALLEST}, 1] of the side")

    @property
    def kind(self) -> str:
        """As of every condition."""
        return "inpainting"

    @property
    def channels(self) -> int:
        """As of every image condition: the known colours, and 1 where they are known."""
        return 4

    def save_facts(self, folder: Path) -> dict[str, Any]:
        """As of every condition."""
        return {"largest": self.largest}

    def table(self, data: CaptionedImages) -> ConditionTable:
        """As of every condition. Raises `UserError` for images with transparency."""
        parts = data.images.split(1024)
        if data.images.shape[1] == 4 and any(bool((part[:, 3] < 255).any()) for part in parts):
            raise UserError(
                "the images have transparent pixels, which in a prompt are those to be filled: write the "
                "data with folder.background=1, or another grey level"
            )
        return super().table(data)

    def maps_of(self, images: Tensor, rows: Tensor) -> Tensor:
        """As of every image condition; an image has the same rectangle in every epoch."""
        side = images.shape[-1]
        numbers = torch.stack(
            [torch.rand(4, generator=torch.Generator().manual_seed(int(row))) for row in rows]
        )
        size = SMALLEST + (self.largest - SMALLEST) * numbers[:, :2]
        start = (1 - size) * numbers[:, 2:]
        centres = (torch.arange(side) + 0.5) / side
        inside = (centres >= start[..., None]) & (centres < (start + size)[..., None])  # (B, 2, side)
        unknown = inside[:, 0, :, None] & inside[:, 1, None, :]
        return masked_map(images, ~unknown[:, None])

    def read(self, path: str, side: int) -> Tensor:
        """As of every image condition: transparent pixels are unknown, or the centre of an opaque image."""
        pixels = torch.from_numpy(read_pixels(path, side).copy()).permute(2, 0, 1)[None]
        mask = torch.ones(1, 1, side, side, dtype=torch.bool)
        if pixels.shape[1] == 4 and bool((pixels[:, 3] < 255).any()):
            mask = pixels[:, 3:] > 127
        else:
            mask[:, :, side // 4 : side - side // 4, side // 4 : side - side // 4] = False
        return masked_map(pixels[:, :3].float() / 255, mask)[0]


def masked_map(images: Tensor, mask: Tensor) -> Tensor:
    """Maps (B, 4, H, W) of images (B, 3, H, W) in [0, 1] and which pixels (B, 1, H, W) are known."""
    return torch.cat([(2 * images - 1) * mask, mask.to(images)], 1)


@final
class ConcatenationDenoiser(DiffusersDenoiser):
    """`UNet2DModel` on the noisy image and a map; the embedding (B, C, h, w) is the map."""

    def call_network(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """As of every denoiser of diffusers."""
        maps = conditioning.embedding
        if maps.shape[2:] != x.shape[2:]:
            maps = F.interpolate(maps, x.shape[2:], mode="bilinear")
        return self.network(torch.cat([x, maps], 1).to(self.network.dtype), timestep).sample

    @property
    def bottleneck(self) -> nn.Module:
        """The U-Net's middle block."""
        return self.network.mid_block


@final
class ConcatenationTeacher(PixelTeacher):
    """A U-Net on pixels whose prompts are image files: what is to be enlarged, or completed."""

    denoiser_class = ConcatenationDenoiser

    def __init__(
        self,
        pipeline: Any,
        condition: ImageCondition,
        name_or_path: str = "",
        identity: TeacherIdentity | None = None,
    ) -> None:
        """pipeline: with a `UNet2DModel`; condition: what it was trained with."""
        super().__init__(pipeline, name_or_path, identity)
        self.condition = condition

    @property
    def channels(self) -> int:
        """As of every teacher of pixels."""
        return self.network.config.out_channels

    def fingerprint(self) -> str:
        """As of every teacher: maps are of the condition."""
        return hashlib.sha256(f"{self.name_or_path} {self.condition}".encode()).hexdigest()[:16]

    def prompt_of(self, row: Mapping[str, Any]) -> str:
        """As of every teacher: the row's image file."""
        return str(row.get(PATH, row["text"]))

    def check_prompt(self, prompt: str) -> None:
        """Raise `UserError` for what is no file."""
        if not is_image_file(prompt):
            raise UserError(
                f"the prompt is {prompt!r}, but {self.name_or_path} ({self.condition.kind}) takes image "
                "files: give the path of one"
            )

    def encode_new(self, prompts: list[str]) -> Conditioning:
        """Maps (B, C, h, w) of files; zeros for the empty prompt."""
        side = self.resolution
        maps = [self.condition.read(prompt, side) for prompt in prompts if prompt]
        empty = torch.zeros_like(maps[0]) if maps else self._no_map(side)
        filled = iter(maps)
        rows = [next(filled) if prompt else empty for prompt in prompts]
        return Conditioning(torch.stack(rows).to(self.device))

    def _no_map(self, side: int) -> Tensor:
        return torch.zeros_like(self.condition.maps_of(torch.zeros(1, 3, side, side), torch.zeros(1))[0])
