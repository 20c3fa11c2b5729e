"""Evaluation of one or several teachers from its options to its files and a table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.data.folders import load_split
from distill.evaluation.clip import load_clip_scorer
from distill.evaluation.evaluation_set import EvaluationSet, SetGraders, make_evaluation_set
from distill.evaluation.graders import load_graders
from distill.evaluation.judge import load_judge
from distill.evaluation.labels import LabelOptions
from distill.evaluation.teacher import EvaluationOptions, evaluate_teacher
from distill.runtime.config import as_mapping
from distill.runtime.errors import UserError
from distill.runtime.files import write_json
from distill.runtime.machine import machine_info
from distill.runtime.names import slug
from distill.runtime.precision import PrecisionName, pick_precision
from distill.teacher.load import load_teacher, require_latent
from distill.teacher.pipeline import LatentTeacher

QUERY = ("data", "reference", "limit", "judge", "pair_judge", "clip", "features", "labels")


@dataclass(frozen=True, kw_only=True)
class TeacherEvaluation:
    """What is graded, on what, by what."""

    teacher: str = "shapes64"
    teachers: tuple[str, ...] = ()  # several beside each other, in place of `teacher`
    judge: str | None = "judge64"  # null: no accuracy
    pair_judge: str | None = None  # a judge of captions of two things; null: those are not graded
    clip: str | None = None  # a CLIP model of transformers; null: the first teacher's own, where it has one
    features: str | None = None  # of the Frechet distance; null: the judge's, else CLIP's
    data: str = "outputs/shapes64"  # a captioned folder, whose test split is used
    # a captioned folder whose test split holds the real images of the Frechet distance, twice as many as
    # samples: its floor is then that of as many real ones; null: the images of `data`, the floor of halves
    reference: str | None = None
    output: str = "outputs/evaluation"  # several teachers: a folder in it for each
    limit: int | None = None  # test images used; null: all
    device: str = "auto"  # auto: cuda when there is one
    precision: PrecisionName = "auto"  # of the networks; auto: bfloat16 on CUDA, float32 on a CPU
    labels: LabelOptions = field(default_factory=LabelOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers that are graded."""
        return self.teachers or (self.teacher,)


def run_teacher_evaluation(recipe: TeacherEvaluation) -> str:
    """Grade and write each teacher's evaluation.json, samples.png and rows; returns a table of all.

    Raises `UserError` for teachers of different resolutions.
    """
    precision = pick_precision(recipe.device, recipe.precision)
    teachers = {
        name: require_latent(load_teacher(name, precision.device, precision.dtype)) for name in recipe.names
    }
    resolutions = {teacher.resolution for teacher in teachers.values()}
    if len(resolutions) != 1:
        raise UserError(f"teachers have the resolutions {sorted(resolutions)}: give those of one")
    test = _evaluation_set(recipe, teachers[recipe.names[0]])

    query = {name: as_mapping(recipe)[name] for name in QUERY}
    figures = {}
    for name, teacher in teachers.items():
        folder = Path(recipe.output) / (slug(name) if recipe.teachers else "")
        clip = load_clip_scorer(name, recipe.clip, precision.device)
        figures[name] = evaluate_teacher(teacher, clip, test, recipe.evaluation, folder, query)
        write_json(folder / "evaluation.json", {"teacher": name, **figures[name], "machine": machine_info()})
    return format_table(figures)


def _evaluation_set(recipe: TeacherEvaluation, teacher: LatentTeacher) -> EvaluationSet:
    device, side = teacher.device, teacher.resolution
    graders = load_graders(recipe.names[0], recipe.judge, recipe.clip, recipe.features, device)
    pair_judge = None if recipe.pair_judge is None else load_judge(recipe.pair_judge, device)
    data = load_split(recipe.data, "test", side, recipe.limit)
    reference = None if recipe.reference is None else load_split(recipe.reference, "test", side)
    set_graders = SetGraders(graders, recipe.labels, pair_judge)
    return make_evaluation_set(data, set_graders, recipe.evaluation.samples, reference)


def format_table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for the floor, and for each teacher, guidance scale and condition."""
    parts = next(iter(figures.values()))
    frechet = parts["frechet"]
    counts = " and ".join(map(str, frechet["floor_counts"]))
    lines = [f"real: {_figures(parts['judge_accuracy']['real'])}  frechet {frechet['floor']:.3g} ({counts})"]
    for name, each in figures.items():
        reconstructions = each["judge_accuracy"]["reconstructions"]
        lines.append(f"{name}, reconstructions: {_figures(reconstructions)}")
        for row in each["samples"]:
            label = f"{name}, {row['condition']}, guidance {row['guidance']:g}"
            rest = {key: value for key, value in row.items() if key not in ("condition", "guidance")}
            lines.append(f"{label}: {_figures(rest)}")
    return "\n".join(lines)


def _figures(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
