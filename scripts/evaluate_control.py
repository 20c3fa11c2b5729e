"""Grade an adapter on held-out conditions.

python scripts/evaluate_control.py adapter=silhouette student=shapes64
"""

from dataclasses import dataclass, field
from pathlib import Path

from entry import entry

from distill.control.adapter import load_adapter
from distill.control.conditions import adapter_input
from distill.control.train import interleave
from distill.data.folders import load_split
from distill.evaluation.control import ControlEvaluationOptions, evaluate_control
from distill.evaluation.generator import format_row
from distill.evaluation.graders import load_graders
from distill.evaluation.labels import LabelOptions
from distill.evaluation.probe import load_probe
from distill.one_step.folder import load_student
from distill.runtime.files import write_json
from distill.runtime.images import image_grid, save_png
from distill.runtime.machine import machine_info, pick_device
from distill.runtime.names import slug
from distill.teacher.load import load_teacher, require_latent
from sds3d.world.conditions import split_condition_images


@dataclass(frozen=True, kw_only=True)
class Config:
    """An adapter, the conditions of a test split, and the same samples without the adapter."""

    teacher: str = "shapes64"
    adapter: str = "silhouette"  # or depth, or a folder of train_controlnet.py
    student: str | None = None  # shapes64, or a folder of distill_one_step.py: graded with the adapter too
    data: str = "outputs/shapes64"
    probe: str = "probe64"
    judge: str | None = "judge64"  # null: no accuracy
    output: str = "outputs/evaluate_control"
    device: str = "auto"
    labels: LabelOptions = field(default_factory=LabelOptions)
    evaluation: ControlEvaluationOptions = field(default_factory=ControlEvaluationOptions)


def main(config: Config) -> None:
    options = config.evaluation
    teacher = require_latent(load_teacher(config.teacher, pick_device(config.device)))
    adapter, condition = load_adapter(config.adapter, teacher.device)
    student = None if config.student is None else load_student(config.student, teacher.device)[0]
    data = load_split(config.data, "test", teacher.resolution, options.samples)
    conditions = split_condition_images(config.data, "test", condition, data)
    probe, graders = load_probe(config.probe), load_graders(config.teacher, config.judge)
    rows, images = evaluate_control(
        teacher, student, adapter, condition, data, conditions, probe, graders, options, config.labels
    )
    print(*map(format_row, rows), sep="\n")
    path = Path(config.output) / f"{slug(config.adapter)}.json"
    facts = {"condition": condition, "samples": options.samples, "machine": machine_info()}
    write_json(path, {**facts, "rows": rows})
    columns = 1 + len(images)
    grid = image_grid(interleave(adapter_input(conditions), *images)[: 12 * columns], 2 * columns)
    save_png(path.with_suffix(".png"), grid)
    print(f"written: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    entry("evaluate_control", Config, main)
