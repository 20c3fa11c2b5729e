"""Pairs of noise and what the teacher makes of it, for DMD's regression: python scripts/make_pairs.py"""

from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    from pathlib import Path

    from distill.data.folders import read_rows
    from distill.one_step.regression import PairOptions, make_pairs
    from distill.runtime.config import build
    from distill.runtime.machine import pick_device
    from distill.teacher.latent import Teacher

    teacher = Teacher.load(config["teacher"], pick_device(config["device"]))
    captions = [row["text"] for row in read_rows(Path(config["data"]) / "train")]
    options = build(PairOptions, config["pairs"], "pairs")
    folder = make_pairs(teacher, captions[: options.count], config["output"], options)
    print(f"written: {folder}: {options.count} pairs")


if __name__ == "__main__":
    entry("make_pairs", main)
