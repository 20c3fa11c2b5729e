"""Train a teacher from a captioned image folder.

python scripts/train_teacher.py teacher.data=outputs/shapes64
On several processes: torchrun --nproc-per-node 2 scripts/train_teacher.py teacher.reuse=shapes64
"""

from dataclasses import dataclass, field

from entry import entry

from distill.runtime.run import RunOptions
from distill.teacher.train import TeacherOptions, train_teacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """CLIP, VAE and U-Net, one after the other; run.steps has no effect: teacher.steps are each part's."""

    run: RunOptions
    teacher: TeacherOptions = field(default_factory=TeacherOptions)


def main(config: Config) -> None:
    print(f"written: {train_teacher(config.run, config.teacher)}")


if __name__ == "__main__":
    entry("train_teacher", Config, main, parallel=True)
