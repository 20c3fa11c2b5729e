"""Teachers without a VAE: DeepFloyd IF's first stage, and U-Nets that know classes or nothing at all.

Their latents are images scaled to [-1, 1].
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from distill.core.conditioning import Conditioning
from distill.core.flow_scheduler import parameterisation
from distill.core.identity import TeacherIdentity
from distill.runtime.errors import UserError
from distill.teacher.denoiser import DiffusersDenoiser, UNetDenoiser
from distill.teacher.pipeline import PipelineTeacher

# Of a folder: {"kind": class, context, none, low_resolution, inpainting or clip, "names": [...],
# "column": of the data's rows, "null_class": the class of no label, and what else the kind needs}
CONDITIONING = "conditioning.json"


def encode_pixels(images: Tensor, channels: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as latents in [-1, 1] of 3 channels, or of 1: their mean."""
    values = images * 2 - 1
    return values if channels == 3 else values.mean(1, keepdim=True)


def decode_pixels(latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], clamped, of latents (B, 1 or 3, H, W)."""
    return (latents / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)


class PixelTeacher(PipelineTeacher):
    """A pipeline teacher whose latents are images."""

    denoiser_class: type[DiffusersDenoiser]

    def __init__(
        self,
        pipeline: Any,
        name_or_path: str = "",
        identity: TeacherIdentity | None = None,
        text_encoders: Sequence[nn.Module] = (),
    ) -> None:
        """pipeline: of diffusers, with a U-Net of the class that `denoiser_class` calls."""
        scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)  # it may clip predicted images
        denoiser = self.denoiser_class(pipeline.unet, *parameterisation(scheduler))
        modules = (*text_encoders, pipeline.unet)
        super().__init__(denoiser, scheduler, modules, name_or_path, identity)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        side = self.network.config.sample_size
        return self.channels, side, side

    @property
    def channels(self) -> int:
        """Of its images: 3, or 1 for grey."""
        return self.network.config.in_channels

    @property
    def resolution(self) -> int:
        """Image side in pixels."""
        return self.network.config.sample_size

    @property
    def size_multiple(self) -> int | None:
        """As of every teacher: what the network's levels halve; None for a network with a size of its own."""
        channels = self.network.config.get("block_out_channels")
        return None if channels is None else 2 ** (len(channels) - 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], scaled to [-1, 1]; their mean where the network is grey."""
        return encode_pixels(images, self.channels)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], clamped."""
        return decode_pixels(latents)


@final
class IFTeacher(PixelTeacher):
    """An `IFPipeline` of DeepFloyd: a T5 encoder and a U-Net on 64 x 64 pixels.

    Its predicted variance is not used, as by deterministic samplers of diffusers.
    """

    denoiser_class = UNetDenoiser

    def __init__(
        self, pipeline: Any, name_or_path: str = "", identity: TeacherIdentity | None = None
    ) -> None:
        """pipeline: an `IFPipeline`, whose parts are frozen."""
        self.pipeline = pipeline
        super().__init__(pipeline, name_or_path, identity, [pipeline.text_encoder])

    def encode_new(self, prompts: list[str]) -> Conditioning:
        """T5's hidden states (B, 77, D)."""
        embedding, _ = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        return Conditioning(embedding)


@final
class ClassDenoiser(DiffusersDenoiser):
    """`diffusers.UNet2DModel`; the embedding (B, 1, 1) is the number of the class, where it has classes."""

    def call_network(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """As of every denoiser of diffusers."""
        classes = self.network.config.num_class_embeds
        labels = None if classes is None else conditioning.embedding[:, 0, 0].round().long()
        output = self.network(x.to(self.network.dtype), timestep, class_labels=labels).sample
        return output[:, : x.shape[1]]

    @property
    def bottleneck(self) -> nn.Module:
        """The U-Net's middle block."""
        return self.network.mid_block


@final
class ClassTeacher(PixelTeacher):
    """A `DDPMPipeline` or `DDIMPipeline`: a U-Net on pixels that knows classes, or no condition at all.

    Prompts are numbers of classes, or their names where they have some (`CONDITIONING`); the only one of an
    unconditional network is 0.
    """

    denoiser_class = ClassDenoiser

    def __init__(
        self,
        pipeline: Any,
        name_or_path: str = "",
        identity: TeacherIdentity | None = None,
        null_class: int | None = None,
        names: Sequence[str] = (),
        column: str | None = None,
    ) -> None:
        """null_class: the one that stands for no label, which guidance needs. names: of the first classes.

        column: of the classes in the rows of its data.
        """
        super().__init__(pipeline, name_or_path, identity)
        self.names, self.column = list(names), column
        self.classes = pipeline.unet.config.num_class_embeds or 1
        self.null_class = 0 if self.classes == 1 else null_class
        if null_class is not None and not 0 <= null_class < self.classes:
            raise UserError(f"null_class is {null_class}: expected a class from 0 to {self.classes - 1}")

    def prompt_of(self, row: Mapping[str, Any]) -> str:
        """As of every teacher: the number of the row's class, or its caption where it has none."""
        if self.classes == 1:
            return "0"
        return str(row.get(self.column or "", row["text"]))

    def check_prompt(self, prompt: str) -> None:
        """Raise `UserError` for what is no class."""
        if prompt in self.names or (prompt.strip().isdecimal() and int(prompt) < self.classes):
            return
        names = f", or a name: {', '.join(self.names[:20])}" if self.names else ""
        raise UserError(
            f"the prompt is {prompt!r}, but the teacher {self.name_or_path} takes numbers of classes: "
            f"give one from 0 to {self.classes - 1}{names}"
        )

    def encode_new(self, prompts: list[str]) -> Conditioning:
        """Numbers of classes (B, 1, 1). Raises `UserError` for the empty prompt where no class is null."""
        numbers = [self._number(prompt) for prompt in prompts]
        return Conditioning(torch.tensor(numbers, dtype=torch.float32, device=self.device)[:, None, None])

    def _number(self, prompt: str) -> int:
        if prompt in self.names:
            return self.names.index(prompt)
        if prompt:
            return int(prompt)
        if self.null_class is None:
            raise UserError(
                f"the teacher {self.name_or_path} has {self.classes} classes, and which one stands for no "
                "label is not known: give null_class, in a YAML file of a "
                "distill.teacher.families.PipelineSource"
            )
        return self.null_class
