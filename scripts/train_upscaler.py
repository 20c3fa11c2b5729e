"""Train an upscaler (SRResNet) from 64 to 512 pixels, and compare it with bicubic interpolation.

python scripts/make_shapes.py output=outputs/renders512 world.resolution=512 world.train=800 \
    world.validation=16 world.test=100 world.seed=512
python scripts/train_upscaler.py
Used by sample.py upscale=512 and text_to_3d.py export.upscale=512.
"""

import json
from dataclasses import dataclass, field

from entry import entry

from distill.data.folders import load_split
from distill.runtime.config import as_mapping
from distill.runtime.run import Run, RunOptions
from distill.upscaler.network import UpscalerOptions, save_upscaler
from distill.upscaler.train import train_upscaler, upscaler_figures


@dataclass(frozen=True, kw_only=True)
class Config:
    """An upscaler of renders, or of any images."""

    run: RunOptions
    data: str = "outputs/renders512"  # an image folder with the splits train and test
    resolution: int = 512  # of the large images, in pixels a side
    upscaler: UpscalerOptions = field(default_factory=UpscalerOptions)


def main(config: Config) -> None:
    train, test = (load_split(config.data, split, config.resolution) for split in ("train", "test"))
    run = Run(config.run, as_mapping(config), "upscaler")
    upscaler = train_upscaler(run, train, config.upscaler)
    sides = config.resolution, config.resolution // 2
    figures = upscaler_figures(upscaler.cpu(), test, sides)
    save_upscaler(upscaler, run.directory / "upscaler", figures)
    run.finish(figures)
    print(json.dumps(figures, indent=2))
    print(f"written: {run.directory}/upscaler")


if __name__ == "__main__":
    entry("train_upscaler", Config, main)
