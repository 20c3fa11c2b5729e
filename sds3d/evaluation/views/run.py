"""Evaluation of a teacher of cameras from its options to its files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.evaluation.judge import Judge, load_judge, read_directions
from distill.evaluation.rows import cached_row
from distill.runtime.checkpoint import fingerprint
from distill.runtime.config import as_mapping
from distill.runtime.errors import UserError
from distill.runtime.files import write_json
from distill.runtime.machine import machine_info
from distill.runtime.precision import PrecisionName, pick_precision
from distill.runtime.shipped import resolve
from distill.teacher.folder import CLIP, load_clip
from distill.teacher.load import load_teacher, require_latent
from sds3d.evaluation.views.azimuth import AzimuthOptions, evaluate_azimuths
from sds3d.evaluation.views.multi_view import MultiViewOptions, evaluate_multi_view
from sds3d.evaluation.views.novel_views import NovelViewOptions, evaluate_novel_views
from sds3d.evaluation.views.sampling import SamplingOptions, ViewTeacher

AZIMUTH = "azimuth"  # the direction that the judge must read


@dataclass(frozen=True, kw_only=True)
class ViewEvaluation:
    """A teacher that is conditioned on cameras, and which of its abilities are graded; null: not this one."""

    teacher: str
    judge: str | None = None  # a judge that reads the azimuth (scripts/train_judge.py attributes=pairs)
    output: str = "outputs/evaluate_views"
    device: str = "auto"  # auto: cuda when there is one
    precision: PrecisionName = "auto"  # of the networks; auto: bfloat16 on CUDA, float32 on a CPU
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    azimuth: AzimuthOptions | None = field(default_factory=AzimuthOptions)  # needs a judge
    multi_view: MultiViewOptions | None = field(default_factory=MultiViewOptions)
    novel_views: NovelViewOptions | None = field(default_factory=NovelViewOptions)


def run_view_evaluation(recipe: ViewEvaluation) -> dict[str, Any]:
    """Grade and write evaluation.json and a PNG of each ability; abilities already graded are not again.

    Raises `UserError` for a teacher without cameras and a judge that does not read azimuths.
    """
    precision = pick_precision(recipe.device, recipe.precision)
    teacher = require_latent(load_teacher(recipe.teacher, precision.device, precision.dtype))
    if not teacher.conditioned_on_cameras:
        raise UserError(
            f"the teacher {recipe.teacher} is not conditioned on cameras (it has no view_conditions folder): "
            "give one that was trained with views (scripts/train_teacher.py with teacher.unet.views)"
        )
    folder = resolve("teacher", recipe.teacher)
    clip = load_clip(folder, precision.device) if (folder / CLIP / "config.json").is_file() else None
    judge = None if recipe.judge is None else _azimuth_judge(recipe.judge, precision.device)
    view_teacher = ViewTeacher(teacher, clip, recipe.sampling)

    values = as_mapping(recipe)
    query = {"network": fingerprint(teacher.network), "encoders": teacher.fingerprint()}
    query |= {name: values[name] for name in ("sampling", "judge")}
    output = Path(recipe.output)
    figures = {}
    for name, compute in _abilities(recipe, view_teacher, judge, output).items():
        row = cached_row(output / f"{name}.json", {**query, "options": values[name]}, compute)
        figures[name] = {key: value for key, value in row.items() if key not in (*query, "options")}
    facts = {"teacher": recipe.teacher, "sampling": values["sampling"], "machine": machine_info()}
    write_json(output / "evaluation.json", {**figures, **facts})
    return figures


def _azimuth_judge(name: str, device: torch.device) -> Judge:
    judge = load_judge(name, device)
    if AZIMUTH not in judge.options.directions:
        raise UserError(
            f"the judge {name} reads no azimuth: give one that does (scripts/train_judge.py attributes=pairs)"
        )
    return judge


def _abilities(
    recipe: ViewEvaluation, teacher: ViewTeacher, judge: Judge | None, output: Path
) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """What computes the figures of each ability that is graded."""
    abilities: dict[str, Callable[[], dict[str, Any]]] = {}
    if recipe.azimuth is not None and judge is not None:

        def read_azimuth(images: Tensor, judge: Judge = judge) -> Tensor:
            return read_directions(judge, images)[AZIMUTH]

        abilities["azimuth"] = partial(evaluate_azimuths, teacher, read_azimuth, recipe.azimuth, output)
    if recipe.multi_view is not None:
        abilities["multi_view"] = partial(evaluate_multi_view, teacher, recipe.multi_view, output)
    if recipe.novel_views is not None:
        abilities["novel_views"] = partial(evaluate_novel_views, teacher, recipe.novel_views, output)
    return abilities
