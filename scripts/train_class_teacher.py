"""A teacher of pixels that knows classes, without a VAE, from images with labels.

python scripts/make_dataset.py source=mnist output=outputs/mnist
python scripts/train_class_teacher.py teacher.data=outputs/mnist
python scripts/sample.py "prompts=[0, 1, 2, 3]" teacher=outputs/class_teacher/teacher guidance=1.5 steps=25
"""

from dataclasses import dataclass, field

from entry import entry

from distill.data.folders import load_split
from distill.runtime.config import as_mapping
from distill.runtime.run import Run, RunOptions
from distill.teacher.class_training import ClassTeacherOptions, class_names, train_class_teacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """A U-Net on pixels with class labels, such as of handwritten digits."""

    run: RunOptions
    teacher: ClassTeacherOptions = field(default_factory=ClassTeacherOptions)


def main(config: Config) -> None:
    options = config.teacher
    data = load_split(options.data, "train", options.resolution)
    names = class_names(data, options.label)  # raises before a directory is claimed
    run = Run(config.run, as_mapping(config), "class teacher")
    folder = train_class_teacher(run, options, data, names)
    run.finish({})
    print(f"written: {folder}")


if __name__ == "__main__":
    entry("train_class_teacher", Config, main, parallel=True)
