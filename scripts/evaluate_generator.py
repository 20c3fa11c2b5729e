"""Students and their teacher on a test split.

python scripts/evaluate_generator.py "students=[outputs/one_step/dmd2-seed0/student]"
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from entry import entry

from distill.core.samplers import SamplerName
from distill.data.folders import load_split
from distill.evaluation.generate import student_sampler, teacher_sampler
from distill.evaluation.generator import (
    GeneratorEvaluationOptions,
    cached_rows,
    format_row,
    real_figures,
    reference,
)
from distill.evaluation.graders import load_graders
from distill.evaluation.judge import load_judge
from distill.evaluation.labels import LabelOptions
from distill.one_step.folder import load_student
from distill.runtime.config import as_mapping
from distill.runtime.curves import REAL_FIGURES
from distill.runtime.files import write_json
from distill.runtime.precision import PrecisionName, pick_precision
from distill.teacher.load import load_teacher

# What a row depends on.
QUERY = (
    "data",
    "split",
    "autoencoder",
    "judge",
    "pair_judge",
    "clip",
    "features",
    "limit",
    "labels",
    "evaluation",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Generators, a test split, and what grades samples; a row per generator, kept as JSON."""

    teacher: str = "shapes64"
    autoencoder: str | None = None  # a tiny one in place of the VAE: a folder, madebyollin/taesd
    students: tuple[str, ...] = ()  # shapes64, or folders of distill_one_step.py
    steps: tuple[int, ...] = (50,)  # of the teacher, with each guidance scale; []: no teacher
    guidance: tuple[float, ...] = (2.0,)  # 1: without; 0: without the captions
    sampler: SamplerName = "ddim"  # of the teacher
    judge: str | None = "judge64"  # null: no accuracy
    pair_judge: str | None = None  # of captions of two things: pairs64; null: those are not graded
    clip: str | None = None  # a CLIP model of transformers; null: the teacher's own, where it has one
    features: str | None = None  # a TorchScript Inception, an image model of transformers; null: the judge's
    data: str = "outputs/shapes64"  # a captioned folder
    split: Literal["train", "validation", "test"] = "test"  # whose captions and images are used
    output: str = "outputs/evaluate_generator"
    limit: int | None = None  # test images used; null: all
    device: str = "auto"  # auto: cuda when there is one
    precision: PrecisionName = "auto"  # of the networks; auto: bfloat16 on CUDA, float32 on a CPU
    labels: LabelOptions = field(default_factory=LabelOptions)
    evaluation: GeneratorEvaluationOptions = field(default_factory=GeneratorEvaluationOptions)


def main(config: Config) -> None:
    precision = pick_precision(config.device, config.precision)
    device, dtype = precision.device, precision.dtype
    teacher = load_teacher(config.teacher, device, dtype, config.autoencoder)
    students = [load_student(name, device, dtype, teacher)[0] for name in config.students]
    samplers = [student_sampler(*named) for named in zip(config.students, students, strict=True)]
    samplers += [
        teacher_sampler(teacher, steps, scale, sampler=config.sampler)
        for steps in config.steps
        for scale in config.guidance
    ]
    data = load_split(config.data, config.split, teacher.resolution, config.limit)
    data = data.with_prompts(teacher.prompt_of)
    graders = load_graders(config.teacher, config.judge, config.clip, config.features, device)
    query = {name: as_mapping(config)[name] for name in QUERY}
    pair_judge = None if config.pair_judge is None else load_judge(config.pair_judge, device)
    real = reference(data, graders, config.labels, pair_judge)
    truth = real_figures(real, config.evaluation.samples)
    write_json(Path(config.output) / REAL_FIGURES, truth | query)
    print(format_row(truth))
    for row in cached_rows(samplers, teacher, real, config.evaluation, query, config.output):
        print(format_row({name: value for name, value in row.items() if name not in ("weights", *QUERY)}))
    print(f"written: {config.output}/*.json, *.png")


if __name__ == "__main__":
    entry("evaluate_generator", Config, main)
