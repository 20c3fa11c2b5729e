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
from distill.evaluation.control import (
    ControlEvaluationOptions,
    ControlGraders,
    ControlledModels,
    ControlTest,
    evaluate_control,
)
from distill.evaluation.generator import format_row
from distill.evaluation.graders import load_graders
from distill.evaluation.labels import LabelOptions
from distill.evaluation.probe import load_probe
from distill.one_step.folder import load_student
from distill.runtime.files import write_json
from distill.runtime.images import image_grid, save_png
from distill.runtime.machine import machine_info
from distill.runtime.names import slug
from distill.runtime.precision import PrecisionName, pick_precision
from distill.teacher.load import load_teacher, require_pipeline
from sds3d.world.conditions import split_condition_images


@dataclass(frozen=True, kw_only=True)
class Config:
    """An adapter, the conditions of a test split, and the same samples without the adapter."""

    teacher: str = "shapes64"
    adapter: str = "silhouette"  # or depth, or a folder of train_controlnet.py
    any_teacher: bool = False  # also an adapter that was trained on another teacher of the same shape
    condition: str | None = None  # of an adapter that reads several; null: the one it was trained on
    student: str | None = None  # shapes64, or a folder of distill_one_step.py: graded too
    data: str = "outputs/shapes64"
    probe: str | None = "probe64"  # null: no figures but those of lines
    judge: str | None = "judge64"  # null: no accuracy
    output: str = "outputs/evaluate_control"
    device: str = "auto"  # auto: cuda when there is one
    precision: PrecisionName = "auto"  # of the networks; auto: bfloat16 on CUDA, float32 on a CPU
    labels: LabelOptions = field(default_factory=LabelOptions)
    evaluation: ControlEvaluationOptions = field(default_factory=ControlEvaluationOptions)


def main(config: Config) -> None:
    options = config.evaluation
    precision = pick_precision(config.device, config.precision)
    device, dtype = precision.device, precision.dtype
    teacher = require_pipeline(load_teacher(config.teacher, device, dtype))
    adapter, trained_on = load_adapter(config.adapter, teacher, config.any_teacher)
    condition = trained_on if config.condition is None else config.condition
    student = None if config.student is None else load_student(config.student, device, dtype, teacher)[0]
    data = load_split(config.data, "test", teacher.resolution, options.samples)
    conditions = split_condition_images(config.data, "test", condition, data)
    data = data.with_prompts(teacher.prompt_of)
    probe = None if config.probe is None else load_probe(config.probe, device, teacher)
    graders = load_graders(config.teacher, config.judge, device=device)
    rows, images = evaluate_control(
        ControlledModels(teacher, adapter, student),
        ControlTest(condition, data, conditions),
        ControlGraders(probe, graders, config.labels),
        options,
    )
    print(*map(format_row, rows), sep="\n")
    name = config.adapter if config.condition is None else f"{config.adapter}-{condition}"
    path = Path(config.output) / f"{slug(name)}.json"
    facts = {"condition": condition, "samples": options.samples, "machine": machine_info()}
    write_json(path, {**facts, "rows": rows})
    columns = 1 + len(images)
    grid = image_grid(interleave(adapter_input(conditions), *images)[: 12 * columns], 2 * columns)
    save_png(path.with_suffix(".png"), grid)
    print(f"written: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    entry("evaluate_control", Config, main)
