"""Grade a teacher on a test split.

python scripts/evaluate_teacher.py teacher=shapes64 data=outputs/shapes64
Any captioned folder: python scripts/evaluate_teacher.py data=photos labels=none judge=null
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from entry import entry

from distill.data.folders import load_split
from distill.evaluation.graders import load_graders
from distill.evaluation.labels import LabelOptions
from distill.evaluation.teacher import EvaluationOptions, evaluate_teacher
from distill.runtime.files import write_json
from distill.runtime.images import image_grid, save_png
from distill.runtime.machine import machine_info
from distill.runtime.precision import PrecisionName, pick_precision
from distill.teacher.load import load_teacher, require_latent


@dataclass(frozen=True, kw_only=True)
class Config:
    """A teacher, a test split, and what grades samples."""

    teacher: str = "shapes64"
    judge: str | None = "judge64"  # null: no accuracy
    clip: str | None = None  # a CLIP model of transformers; null: the teacher's own, where it has one
    features: str | None = None  # of the Frechet distance; null: the judge's, else CLIP's
    data: str = "outputs/shapes64"  # a captioned folder, whose test split is used
    output: str = "outputs/evaluation"
    limit: int | None = None  # test images used; null: all
    device: str = "auto"  # auto: cuda when there is one
    precision: PrecisionName = "auto"  # of the networks; auto: bfloat16 on CUDA, float32 on a CPU
    labels: LabelOptions = field(default_factory=LabelOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)


def main(config: Config) -> None:
    precision = pick_precision(config.device, config.precision)
    teacher = require_latent(load_teacher(config.teacher, precision.device, precision.dtype))
    graders = load_graders(config.teacher, config.judge, config.clip, config.features, precision.device)
    data = load_split(config.data, "test", teacher.resolution, config.limit)
    metrics, samples = evaluate_teacher(teacher, graders, data, config.evaluation, config.labels)
    folder = Path(config.output)
    write_json(folder / "evaluation.json", {**metrics, "machine": machine_info()})
    save_png(folder / "samples.png", image_grid(samples[:96], 12))
    print(json.dumps(metrics, indent=2))
    print(f"written: {folder}/evaluation.json, {folder}/samples.png")


if __name__ == "__main__":
    entry("evaluate_teacher", Config, main)
