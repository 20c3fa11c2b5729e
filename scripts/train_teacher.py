"""Train a teacher from a captioned image folder: python scripts/train_teacher.py teacher.data=outputs/shapes64"""

from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    from distill.runtime.config import build
    from distill.runtime.run import RunOptions
    from distill.teacher.train import TeacherOptions, train_teacher

    folder = train_teacher(
        build(RunOptions, config["run"], "run"), build(TeacherOptions, config["teacher"], "teacher")
    )
    print(f"written: {folder}")


if __name__ == "__main__":
    entry("train_teacher", main)
