"""Grade a teacher on a test split: python scripts/evaluate_teacher.py teacher=shapes64 data=outputs/shapes64"""

import json
from pathlib import Path
from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    from distill.data.folders import load_split
    from distill.evaluation.judge import load_judge
    from distill.evaluation.teacher import EvaluationOptions, evaluate_teacher
    from distill.runtime.config import build
    from distill.runtime.files import write_json
    from distill.runtime.images import image_grid, save_png
    from distill.runtime.machine import machine_facts
    from distill.teacher.latent import Teacher

    options = build(EvaluationOptions, config["evaluation"], "evaluation")
    teacher = Teacher.load(config["teacher"])
    data = load_split(config["data"], "test", teacher.resolution, config["limit"])
    figures, samples = evaluate_teacher(teacher, load_judge(config["judge"]), data, options)
    folder = Path(config["output"])
    write_json(folder / "evaluation.json", {**figures, "machine": machine_facts()})
    save_png(folder / "samples.png", image_grid(samples[:96], 12))
    print(json.dumps(figures, indent=2))
    print(f"written: {folder}/evaluation.json, {folder}/samples.png")


if __name__ == "__main__":
    entry("evaluate_teacher", main)
