"""Copy a student to a folder of its own, whole: with its teacher's VAE, text encoder and tokenizer.

python scripts/save_student.py student=shapes64 output=outputs/student
Stock diffusers loads the result (docs/one_step.md).
"""

from dataclasses import dataclass
from pathlib import Path

from entry import entry

from distill.one_step.folder import load_student, save_student


@dataclass(frozen=True, kw_only=True)
class Config:
    """A student by shipped name or folder, and where to."""

    student: str = "shapes64"  # a shipped name, or a folder of distill_one_step.py
    output: str = "outputs/student"  # a new folder, or one that holds a student, which is replaced
    # false: without its teacher's parts, which are then read from the teacher by name: the size of the U-Net
    whole: bool = True


def main(config: Config) -> None:
    student, parts = load_student(config.student)
    save_student(config.output, student, parts, config.whole)
    size = sum(path.stat().st_size for path in Path(config.output).rglob("*") if path.is_file())
    print(f"written: {config.output}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    entry("save_student", Config, main)
