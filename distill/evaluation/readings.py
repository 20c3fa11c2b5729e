"""What graders read from images that come in batches, so that a large set is never in memory as a whole."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.data.folders import CaptionedImages
from distill.evaluation.graders import Graders
from distill.evaluation.judge import predict
from distill.evaluation.labels import LabelOptions, Row, prediction_accuracy
from distill.runtime.errors import UserError

PREVIEW = 96  # images that readings hold, for a grid


@dataclass(frozen=True)
class Readings:
    """What graders read from N images; empty or None where there is no such grader.

    features (N, D) for set distances; the judge's predictions by column, N each; CLIP's unit features (N, D);
    the first images (at most 96, 3, H, W).
    """

    features: Tensor
    predictions: Mapping[str, Sequence[str]]
    clip_features: Tensor | None
    preview: Tensor

    def accuracy(self, graders: Graders, rows: Sequence[Row], labels: LabelOptions) -> dict[str, float]:
        """The judge's accuracy against N rows (`judge_accuracy`); empty without a judge."""
        if graders.judge is None:
            return {}
        return prediction_accuracy(graders.judge, self.predictions, rows, labels)

    def clip_figures(self, graders: Graders, captions: Sequence[str]) -> dict[str, float]:
        """The mean cosine of images and their N captions (`clip_score`); empty without CLIP."""
        if graders.clip is None or self.clip_features is None:
            return {}
        texts = sorted(set(captions))
        table = graders.clip.text_features(texts)[[texts.index(caption) for caption in captions]]
        return {"clip_score": float((self.clip_features * table).sum(1).mean())}


@torch.no_grad()
def read_images(batches: Iterable[Tensor], graders: Graders) -> Readings:
    """The readings of images (B, 3, H, W) in [0, 1] in batches.

    Raises `UserError` where there are none, and where the graders have no features.
    """
    features: list[Tensor] = []
    clip_features: list[Tensor] = []
    preview: list[Tensor] = []
    predictions: dict[str, list[str]] = {}
    for images in batches:
        features.append(graders.features(images))
        if graders.clip is not None:
            clip_features.append(graders.clip.image_features(images))
        if graders.judge is not None:
            for name, values in predict(graders.judge, images).items():
                predictions.setdefault(name, []).extend(values)
        room = PREVIEW - sum(map(len, preview))
        if room > 0:
            preview.append(images[:room].clone())
    if not features:
        raise UserError("there are no images to grade: at least one is needed")
    joined = torch.cat(clip_features) if clip_features else None
    return Readings(torch.cat(features), predictions, joined, torch.cat(preview))


def image_batches(data: CaptionedImages, batch: int = 250) -> Iterator[Tensor]:
    """The images (B, 3, H, W) of a split in [0, 1] over its fixed grey levels, in order."""
    return (data.composite(indices) for indices in torch.arange(len(data)).split(batch))
