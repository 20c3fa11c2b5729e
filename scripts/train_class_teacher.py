"""A teacher of pixels that knows classes, without a VAE, from images with labels.

python scripts/make_dataset.py source=mnist output=outputs/mnist
python scripts/train_class_teacher.py teacher.data=outputs/mnist
python scripts/sample.py "prompts=[0, 1, 2, 3]" teacher=outputs/class_teacher/teacher guidance=1.5 steps=25
"""

from dataclasses import dataclass, field

from entry import entry

from distill.runtime.config import as_mapping
from distill.runtime.run import Run, RunOptions
from distill.teacher.class_training import ClassTeacherOptions, train_class_teacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """A U-Net on pixels with class labels, such as of handwritten digits."""

    run: RunOptions
    teacher: ClassTeacherOptions = field(default_factory=ClassTeacherOptions)


def main(config: Config) -> None:
    run = Run(config.run, as_mapping(config), "class teacher")
    folder = train_class_teacher(run, config.teacher)
    run.finish({})
    print(f"written: {folder}")


if __name__ == "__main__":
    entry("train_class_teacher", Config, main, parallel=True)
