"""Training of a judge as one run: its data, its training, its accuracy on the test split, its folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from distill.data.folders import CaptionedImages, load_split
from distill.evaluation.directions import direction_accuracy
from distill.evaluation.judge import Judge, load_judge, predict, save_judge, train_judge
from distill.evaluation.judge_columns import JudgeOptions
from distill.evaluation.labels import LabelOptions, prediction_accuracy
from distill.evaluation.pairs import pair_accuracy
from distill.runtime.config import as_mapping
from distill.runtime.run import Run, RunOptions


@dataclass(frozen=True, kw_only=True)
class JudgeRecipe:
    """What a judge's training depends on."""

    run: RunOptions
    data: str | tuple[str, ...] = "outputs/judge_world"  # one captioned folder, or several
    resolution: int = 64  # image side in pixels, at least 16
    judge: JudgeOptions
    initial: str | None = None  # a judge of the same width whose convolutions training starts from
    labels: LabelOptions = field(default_factory=LabelOptions)  # which columns pairs have


def load_splits(folders: str | Sequence[str], split: str, resolution: int) -> CaptionedImages:
    """The same split of one or several captioned folders, one after the other."""
    folders = [folders] if isinstance(folders, str) else folders
    parts = [load_split(folder, split, resolution) for folder in folders]
    rows = [row for part in parts for row in part.rows]
    return CaptionedImages(torch.cat([part.images for part in parts]), rows)


def with_pair_columns(data: CaptionedImages, labels: LabelOptions) -> CaptionedImages:
    """The same images, their rows with the columns that pairs are read as (`PairLabels.derive`)."""
    return CaptionedImages(data.images, [{**row, **labels.pair.derive(row)} for row in data.rows])


def judge_metrics(judge: Judge, data: CaptionedImages, labels: LabelOptions) -> dict[str, Any]:
    """Accuracy by column, of directions, and of pairs where the judge reads all their columns."""
    images = data.composite(slice(None))
    predictions = predict(judge, images)
    pairs = {}
    if labels.pair.relation and set(labels.pair.visible) <= set(judge.labels):
        pairs = pair_accuracy(predictions, data.rows, labels.pair)
    columns = prediction_accuracy(judge, predictions, data.rows)
    return {**columns, **direction_accuracy(judge, images, data.rows), **pairs}


def run_judge(recipe: JudgeRecipe) -> dict[str, Any]:
    """Train, grade on the test split and save to `judge` in the run's directory; returns the metrics."""
    train, test = (
        with_pair_columns(load_splits(recipe.data, split, recipe.resolution), recipe.labels)
        for split in ("train", "test")
    )
    initial = None if recipe.initial is None else load_judge(recipe.initial)
    run = Run(recipe.run, as_mapping(recipe), "judge")
    judge = train_judge(run, train, recipe.judge, initial)
    metrics = {"test": judge_metrics(judge, test, recipe.labels)}
    save_judge(judge, run.directory / "judge", metrics)
    run.finish(metrics)
    return metrics
