"""Grade an adapter on held-out conditions: python scripts/evaluate_control.py adapter=silhouette student=shapes64"""

from pathlib import Path
from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    from distill.control.adapter import load_adapter
    from distill.control.conditions import as_input
    from distill.control.train import strip
    from distill.data.folders import load_split
    from distill.evaluation.control import ControlEvaluationOptions, evaluate_control
    from distill.evaluation.judge import load_judge
    from distill.evaluation.probe import load_probe
    from distill.one_step.folder import load_student
    from distill.runtime.config import build
    from distill.runtime.files import write_json
    from distill.runtime.images import image_grid, save_png
    from distill.runtime.machine import machine_facts, pick_device
    from distill.runtime.names import slug
    from distill.teacher.latent import Teacher
    from sds3d.world.conditions import split_pictures

    options = build(ControlEvaluationOptions, config["evaluation"], "evaluation")
    teacher = Teacher.load(config["teacher"], pick_device(config["device"]))
    adapter, condition = load_adapter(config["adapter"], teacher.device)
    student = None if config["student"] is None else load_student(config["student"], teacher.device)[0]
    data = load_split(config["data"], "test", teacher.resolution, options.samples)
    pictures = split_pictures(config["data"], "test", condition, data)
    readers = load_probe(config["probe"]), load_judge(config["judge"])
    rows, images = evaluate_control(teacher, student, adapter, condition, data, pictures, readers, options)
    for row in rows:
        print(
            "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else str(value)
                for name, value in row.items()
            )
        )
    path = Path(config["output"]) / f"{slug(str(config['adapter']))}.json"
    write_json(
        path, {"condition": condition, "rows": rows, "samples": options.samples, "machine": machine_facts()}
    )
    save_png(
        path.with_suffix(".png"),
        image_grid(strip(as_input(pictures), *images)[: 12 * (1 + len(images))], 2 * (1 + len(images))),
    )
    print(f"written: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    entry("evaluate_control", main)
