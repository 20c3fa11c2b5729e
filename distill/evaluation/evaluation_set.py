"""The held-out images that teachers are graded on, and what the same graders say of the real ones."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.data.folders import CaptionedImages
from distill.evaluation.graders import Graders
from distill.evaluation.judge import Judge, predict
from distill.evaluation.labels import LabelOptions
from distill.evaluation.metrics import Moments, frechet_distance, moments
from distill.evaluation.pairs import pair_accuracy
from distill.evaluation.readings import Readings, image_batches, read_images
from distill.runtime.errors import UserError


@dataclass(frozen=True)
class SetGraders:
    """Common to all teachers: graders of captions of one thing, and a judge of captions of two."""

    common: Graders
    labels: LabelOptions
    pair_judge: Judge | None = None

    def __post_init__(self) -> None:
        columns = set() if self.pair_judge is None else set(self.pair_judge.labels)
        missing = set(self.labels.pair.visible) - columns
        if self.pair_judge is not None and missing:
            raise UserError(
                f"the judge of pairs does not read {', '.join(sorted(missing))}: give one that does "
                "(scripts/train_judge.py attributes=pairs), or pair_judge=null"
            )

    def pair_figures(self, batches: Iterable[Tensor], pairs: CaptionedImages) -> dict[str, float]:
        """`pair_accuracy` of images (B, 3, H, W) in batches; empty without a judge of pairs, or pairs."""
        if self.pair_judge is None or not len(pairs):
            return {}
        predictions: dict[str, list[str]] = {}
        for images in batches:
            for name, values in predict(self.pair_judge, images).items():
                predictions.setdefault(name, []).extend(values)
        return pair_accuracy(predictions, pairs.rows, self.labels.pair)


@dataclass(frozen=True)
class EvaluationSet:
    """Rows with a caption of one thing, rows of two, and the real images that Frechet distances are to.

    floor: the distance of two disjoint sets of real images, of `floor_counts` each.
    """

    data: CaptionedImages
    pairs: CaptionedImages
    graders: SetGraders
    statistics: Moments
    count: int  # of the real images
    floor: float
    floor_counts: tuple[int, int]
    figures: dict[str, Any]  # the judges' accuracies on the real images

    def frechet(self, readings: Readings) -> float:
        """The distance of other images to the real ones."""
        return frechet_distance(moments(readings.features), self.statistics)


def make_evaluation_set(
    data: CaptionedImages, graders: SetGraders, samples: int, reference: CaptionedImages | None = None
) -> EvaluationSet:
    """The evaluation set of a split.

    Without `reference` the real images are all those of the split, and the floor is that of its halves. Of a
    reference they are the first `samples`, and the floor is their distance to the next `samples`: the bias
    of a distance depends on the counts (Heusel et al. 2017), which are then those of as many samples.
    Raises `UserError` for fewer than four rows, a reference that is too small, and without features.
    """
    labels = graders.labels
    single, pairs = _with_caption(data, labels)
    if len(single) < 4:
        excluded = f" without {labels.exclude_if}" if labels.exclude_if else ""
        raise UserError(f"the test split has {len(single)} rows{excluded}: at least 4 are needed")
    readings = read_images(image_batches(single), graders.common)
    accuracy = readings.accuracy(graders.common, single.rows, labels)
    figures = {"one": accuracy, "two": graders.pair_figures(image_batches(pairs), pairs)}

    features = readings.features
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    halves = [features[half] for half in order.chunk(2)]
    if reference is not None:
        halves = _reference_features(reference, graders, samples)
        features = halves[0]
    first, second = (moments(half) for half in halves)
    counts = len(halves[0]), len(halves[1])
    floor = frechet_distance(first, second)
    return EvaluationSet(single, pairs, graders, moments(features), len(features), floor, counts, figures)


def _with_caption(data: CaptionedImages, labels: LabelOptions) -> tuple[CaptionedImages, CaptionedImages]:
    """The rows with a caption: of one thing, and of two."""
    data = data.select([i for i, text in enumerate(data.texts) if text.strip()])
    return data.select(labels.labelled(data.rows)), data.select(labels.pair.rows(data.rows))


def _reference_features(reference: CaptionedImages, graders: SetGraders, samples: int) -> list[Tensor]:
    """Features of the first `samples` labelled images, and of as many others."""
    single, _ = _with_caption(reference, graders.labels)
    if len(single) < 2 * samples:
        raise UserError(
            f"the reference has {len(single)} labelled test images: at least {2 * samples} are needed, twice "
            f"evaluation.samples={samples}"
        )
    single = single.select(range(2 * samples))
    return list(read_images(image_batches(single), graders.common).features.split(samples))
