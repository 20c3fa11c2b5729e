"""A teacher of pixels that knows classes: `diffusers.UNet2DModel`, trained by the same loop as a U-Net of
latents.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DDIMPipeline, UNet2DModel

from distill.core.conditioning import Conditioning
from distill.core.flow_scheduler import ode_scheduler, parameterisation
from distill.data.folders import CaptionedImages
from distill.data.latents import LatentCache
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_folder, write_json
from distill.runtime.run import Run
from distill.teacher.pixels import CLASSES, ClassDenoiser, decode_pixels, encode_pixels
from distill.teacher.unet import UnetOptions, make_scheduler, train_denoiser

MOST_CLASSES = 10_000  # a label beyond is taken for a mistake


@dataclass(frozen=True)
class ClassTeacherOptions:
    """Data with a label in each row, and the U-Net; `unet.caption_dropout` is that of the labels.

    Sizes and training are those of `UnetOptions`; its heads have the attention at the coarsest level.
    """

    data: str = "outputs/mnist"  # a captioned image folder (make_dataset.py)
    resolution: int = 28
    label: str = "label"  # the key of the class in a row, a number from 0 on
    colour: bool = False  # three channels; false: grey
    unet: UnetOptions = field(
        default_factory=lambda: UnetOptions(channels=(32, 64, 128), batch=128, learning_rate=1e-3)
    )

    def __post_init__(self) -> None:
        if self.unet.views is not None or self.unet.prediction == "flow_prediction":
            raise UserError(
                "a class-conditional teacher of pixels has no views and predicts eps or v: give "
                "teacher.unet.views=null and another teacher.unet.prediction"
            )
        multiple = 2 ** (len(self.unet.channels) - 1)
        if self.resolution % multiple:
            raise UserError(
                f"resolution {self.resolution} is not a multiple of {multiple}, as {len(self.unet.channels)} "
                "levels need"
            )


def class_names(data: CaptionedImages, label: str) -> list[str]:
    """A name of each class from 0 on: the caption that all of its images share, else its number.

    Raises `UserError` for rows without a label, or with one that is no class.
    """
    captions: dict[int, set[str]] = {}
    for row in data.rows:
        value = row.get(label)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MOST_CLASSES:
            raise UserError(
                f"{row['file_name']} has the {label} {value!r}: expected a class, a number from 0 on"
            )
        captions.setdefault(value, set()).add(row["text"])
    texts = [captions.get(number, set()) for number in range(max(captions) + 1)]
    names = [next(iter(text)) if len(text) == 1 else str(number) for number, text in enumerate(texts)]
    return names if len(set(names)) == len(names) else [str(number) for number in range(len(names))]


def pixel_cache(data: CaptionedImages, label: str, classes: int, channels: int) -> LatentCache:
    """Images as latents, and numbers of classes as their conditioning; the last is that of no label."""
    numbers = torch.arange(classes + 1, dtype=torch.float32)[:, None, None]
    parts = torch.arange(len(data)).split(1024)
    pixels = torch.cat([encode_pixels(data.composite(part), channels).half() for part in parts])
    return LatentCache(pixels, Conditioning(numbers), torch.tensor([row[label] for row in data.rows]))


def build_class_unet(options: UnetOptions, classes: int, channels: int, side: int) -> UNet2DModel:
    """An untrained U-Net of so many classes; attention at its coarsest level."""
    levels = len(options.channels)
    unet = UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=options.channels,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        layers_per_block=options.layers,
        attention_head_dim=options.channels[-1] // options.heads,
        norm_num_groups=16,
        num_class_embeds=classes,
    )
    return unet.to(memory_format=torch.channels_last)


def train_class_teacher(
    run: Run, options: ClassTeacherOptions, data: CaptionedImages, names: list[str]
) -> Path:
    """Train on a split and save `<run.directory>/teacher`, a `DDIMPipeline`; returns its path.

    names: of the data's classes (`class_names`); the class after them is that of no label.
    """
    channels = 3 if options.colour else 1
    cache = pixel_cache(data, options.label, len(names), channels)
    scheduler = ode_scheduler(make_scheduler(options.unet))

    def build() -> ClassDenoiser:
        unet = build_class_unet(options.unet, len(names) + 1, channels, options.resolution)
        return ClassDenoiser(unet.to(run.device), *parameterisation(scheduler))

    denoiser, averaged = build(), build()
    train_denoiser(run, cache, options.unet, denoiser, averaged, decode_pixels)
    folder = run.directory / "teacher"
    if run.main:
        save_class_teacher(folder, averaged.network, options.unet, names)
    return folder


def save_class_teacher(folder: Path, unet: UNet2DModel, options: UnetOptions, names: list[str]) -> None:
    """Write a folder that diffusers loads as a `DDIMPipeline`, in fp16, and the classes' names.

    An older teacher there is replaced. Raises `UserError` where the folder holds something else.
    """
    with atomic_folder(folder, "model_index.json", "a teacher") as temporary:
        DDIMPipeline(unet=unet.half(), scheduler=make_scheduler(options)).save_pretrained(temporary)
        unet.float()
        write_json(temporary / CLASSES, {"names": names, "null_class": len(names)})
