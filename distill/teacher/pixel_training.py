"""Teachers of pixels, without a VAE and a text encoder, trained by the same loop as a U-Net of latents."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DDIMPipeline
from torch import nn

from distill.core.conditioning import Conditioning
from distill.core.flow_scheduler import ode_scheduler, parameterisation
from distill.data.folders import CaptionedImages
from distill.data.latents import LatentCache
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_folder, write_json
from distill.runtime.run import Run
from distill.teacher.denoiser import DiffusersDenoiser
from distill.teacher.pixel_conditions import ConditionTable, PixelCondition
from distill.teacher.pixels import CONDITIONING, decode_pixels, encode_pixels
from distill.teacher.unet import SNAPSHOTS, UnetOptions, make_scheduler, train_denoiser


@dataclass(frozen=True)
class PixelTeacherOptions:
    """Data, and the U-Net; `unet.caption_dropout` is that of its condition, whatever that is.

    Sizes and training are those of `UnetOptions`; its heads have the attention at the coarsest level.
    """

    data: str = "outputs/mnist"  # a captioned image folder (make_dataset.py)
    resolution: int = 28
    colour: bool = False  # three channels; false: grey
    unet: UnetOptions = field(
        default_factory=lambda: UnetOptions(
            channels=(16, 32, 64),
            batch=128,
            learning_rate=1e-3,
            schedule="squaredcos_cap_v2",
            preview_guidance=1.5,
        )
    )

    def __post_init__(self) -> None:
        if self.unet.views is not None or self.unet.prediction == "flow_prediction":
            raise UserError(
                "a teacher of pixels has no views and predicts eps, v or x0: give "
                "teacher.unet.views=null and another teacher.unet.prediction"
            )
        multiple = 2 ** (len(self.unet.channels) - 1)
        if self.resolution % multiple:
            raise UserError(
                f"resolution {self.resolution} is not a multiple of {multiple}, as {len(self.unet.channels)} "
                "levels need"
            )


def pixel_cache(data: CaptionedImages, table: ConditionTable, channels: int) -> LatentCache:
    """Images as latents, and their conditions."""
    parts = torch.arange(len(data)).split(1024)
    pixels = torch.cat([encode_pixels(data.composite(part), channels).half() for part in parts])
    return LatentCache(pixels, Conditioning(table.rows), table.indices)


def train_pixel_teacher(
    run: Run,
    options: PixelTeacherOptions,
    condition: PixelCondition,
    data: CaptionedImages,
    table: ConditionTable,
) -> Path:
    """Train on a split with its conditions and save `<run.directory>/teacher`; returns its path."""
    channels = 3 if options.colour else 1
    scheduler = ode_scheduler(make_scheduler(options.unet))

    def build() -> DiffusersDenoiser:
        network = condition.build(options.unet, channels, options.resolution, table).to(run.device)
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return condition.denoiser(network, *parameterisation(scheduler))

    denoiser, averaged = build(), build()
    cache = pixel_cache(data, table, channels)

    def save(folder: Path, network: nn.Module) -> None:
        save_pixel_teacher(folder, network, options.unet, condition, table)

    def snapshot(step: int, network: nn.Module) -> None:
        folder = run.directory / SNAPSHOTS / f"{step:06d}"
        if not folder.exists():  # of a run that was resumed from before it
            save(folder, network)

    train_denoiser(run, cache, options.unet, denoiser, averaged, decode_pixels, snapshot=snapshot)
    folder = run.directory / "teacher"
    if run.main:
        save(folder, averaged.network)
    return folder


def save_pixel_teacher(
    folder: Path, network: nn.Module, options: UnetOptions, condition: PixelCondition, table: ConditionTable
) -> None:
    """Write a folder that diffusers loads as a `DDIMPipeline`, in fp16, and what its prompts mean.

    An older teacher there is replaced. Raises `UserError` where the folder holds something else.
    """
    with atomic_folder(folder, "model_index.json", "a teacher") as temporary:
        DDIMPipeline(unet=network.half(), scheduler=make_scheduler(options)).save_pretrained(temporary)
        network.float()
        facts = {
            "kind": condition.kind,
            "names": table.names,
            "column": condition.column,
            "null_class": len(table.names) if condition.kind == "class" else None,
            **condition.save_facts(temporary),
        }
        write_json(temporary / CONDITIONING, facts)
