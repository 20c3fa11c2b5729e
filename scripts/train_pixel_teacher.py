"""A teacher of pixels, without a VAE: conditioned on classes, vectors, images, CLIP's embeddings, or nothing.

python scripts/make_dataset.py source=mnist output=outputs/mnist
python scripts/train_pixel_teacher.py
python scripts/sample.py 0 1 2 3 teacher=outputs/pixel_teacher/teacher guidance=1.5 steps=25
"""

from dataclasses import dataclass, field

from entry import entry

from distill.data.folders import load_split
from distill.runtime.config import as_mapping
from distill.runtime.run import Run, RunOptions
from distill.teacher.pixel_conditions import PixelCondition
from distill.teacher.pixel_training import PixelTeacherOptions, train_pixel_teacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """A U-Net on pixels and what it is conditioned on (configs/conditioning/)."""

    run: RunOptions
    conditioning: PixelCondition
    teacher: PixelTeacherOptions = field(default_factory=PixelTeacherOptions)


def main(config: Config) -> None:
    options, condition = config.teacher, config.conditioning
    data = load_split(options.data, "train", options.resolution)
    table = condition.table(data)  # raises before a directory is claimed
    run = Run(config.run, as_mapping(config), "pixel teacher")
    folder = train_pixel_teacher(run, options, condition, data, table)
    run.finish({})
    print(f"written: {folder}")


if __name__ == "__main__":
    entry("train_pixel_teacher", Config, main, parallel=True)
