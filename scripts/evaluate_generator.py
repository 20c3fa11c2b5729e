"""Students and their teacher on a test split: python scripts/evaluate_generator.py "students=[outputs/one_step/dmd2-seed0/student]" """

from pathlib import Path
from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    from distill.data.folders import load_split
    from distill.evaluation.features import extractor
    from distill.evaluation.generator import (
        GeneratorEvaluationOptions,
        evaluate,
        kept,
        reference,
        student_generator,
        teacher_generator,
    )
    from distill.evaluation.judge import load_judge
    from distill.one_step.folder import load_student
    from distill.runtime.config import build
    from distill.runtime.files import write_json
    from distill.runtime.images import image_grid, save_png
    from distill.runtime.machine import machine_facts, pick_device
    from distill.runtime.names import slug
    from distill.teacher.latent import Teacher

    options = build(GeneratorEvaluationOptions, config["evaluation"], "evaluation")
    teacher = Teacher.load(config["teacher"], pick_device(config["device"]))
    generators = [
        student_generator(place, load_student(place, teacher.device)[0]) for place in config["students"]
    ]
    generators += [
        teacher_generator(teacher, steps, scale) for steps in config["steps"] for scale in config["guidance"]
    ]
    data = load_split(config["data"], "test", teacher.resolution, config["limit"])
    real = reference(data, extractor(config["features"]), load_judge(config["judge"]))
    folder = Path(config["output"])
    for generator in generators:
        path = folder / f"{slug(generator.name)}.json"
        asked = {
            "weights": generator.weights,
            **{name: config[name] for name in ("data", "judge", "features", "limit", "evaluation")},
        }
        row = kept(path, asked)
        if row is None:
            figures, shown = evaluate(generator, teacher, real, options)
            save_png(path.with_suffix(".png"), image_grid(shown, 8))
            row = {**figures, "asked": asked, "machine": machine_facts()}
            write_json(path, row)
        told = {name: value for name, value in row.items() if name not in ("asked", "machine")}
        print(
            "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else str(value)
                for name, value in told.items()
            )
        )
    print(f"written: {folder}/*.json, *.png")


if __name__ == "__main__":
    entry("evaluate_generator", main)
