"""Evaluation of generators: students and their teacher at any steps, on the same captions and noise."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.core.teacher import Teacher
from distill.data.folders import CAPTION, CaptionedImages
from distill.evaluation.evaluation_set import SetGraders
from distill.evaluation.generate import Sampler, generate
from distill.evaluation.graders import Graders
from distill.evaluation.judge import Judge
from distill.evaluation.labels import LabelOptions
from distill.evaluation.metrics import (
    frechet_distance,
    kernel_distance,
    moments,
    precision_recall,
    sample_diversity,
)
from distill.evaluation.rows import cached_row
from distill.runtime.checkpoint import fingerprint
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid, save_png
from distill.runtime.machine import machine_info
from distill.runtime.names import slug


@dataclass(frozen=True)
class GeneratorEvaluationOptions:
    """The sizes of the evaluation."""

    samples: int = 5000  # images, of the test captions in turn
    captions: int = 100  # over which sample diversity is averaged,
    each: int = 8  # of so many samples
    neighbours: int = 3  # k of precision and recall
    batch: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.samples, self.captions, self.each, self.batch) < 2 or self.neighbours < 1:
            raise UserError("samples, captions, each and batch must be at least 2 and neighbours at least 1")


@dataclass(frozen=True)
class Reference:
    """What generators are compared with: a test split, its features (N, D) and their graders."""

    data: CaptionedImages
    features: Tensor
    graders: Graders
    labels: LabelOptions
    pair_judge: Judge | None = None  # of captions of two things


def reference(
    data: CaptionedImages, graders: Graders, labels: LabelOptions, pair_judge: Judge | None = None
) -> Reference:
    """The reference of a test split. Raises `UserError` where the graders have no features.

    And for a judge of pairs that does not read what captions of two things name.
    """
    SetGraders(graders, labels, pair_judge)
    return Reference(data, graders.features(data.composite(slice(None))), graders, labels, pair_judge)


def evaluate_generator(
    sampler: Sampler, teacher: Teacher, real: Reference, options: GeneratorEvaluationOptions
) -> tuple[dict[str, Any], Tensor]:
    """All figures of a generator, and its first 64 images. The teacher encodes the captions and decodes."""
    rows = [real.data.rows[i % len(real.data)] for i in range(options.samples)]
    captions = [row["text"] for row in rows]
    samples = generate(teacher, captions, sampler, options.batch, options.seed)
    features = real.graders.features(samples.images)

    kernel, kernel_std = kernel_distance(real.features, features)
    precision, recall = precision_recall(real.features, features, options.neighbours)
    figures = {
        "generator": sampler.name,
        "nfe": sampler.nfe,
        "frechet": frechet_distance(moments(features), moments(real.features)),
        "kernel": kernel,
        "kernel_std": kernel_std,
        "precision": precision,
        "recall": recall,
        **caption_figures(samples.images, rows, real),
        "diversity": diversity(sampler, teacher, real, options),
        "unet_seconds": samples.unet_seconds / options.samples,
        "decoder_seconds": samples.decoder_seconds / options.samples,
    }
    return figures, samples.images[:64]


def caption_figures(images: Tensor, rows: Sequence[Mapping[str, Any]], real: Reference) -> dict[str, float]:
    """What the judge and CLIP say of images and their captions, without the other images."""
    caption_rows = [{**row, "text": row.get(CAPTION, row["text"])} for row in rows]
    graders, labelled = real.graders, real.labels.labelled(caption_rows)
    captions = [row["text"] for row in caption_rows]
    accuracy = graders.accuracy(images[labelled], [caption_rows[i] for i in labelled], real.labels)
    of_two = real.labels.pair.rows(caption_rows)
    pairs = CaptionedImages(images[of_two], [caption_rows[i] for i in of_two])
    set_graders = SetGraders(graders, real.labels, real.pair_judge)
    accuracy |= set_graders.pair_figures(pairs.images.split(256), pairs)
    return {
        **{f"judge_{name}": value for name, value in accuracy.items()},
        **graders.inception_score(images),
        **graders.caption_retrieval(images, captions),
    }


def real_figures(real: Reference, count: int) -> dict[str, Any]:
    """`caption_figures` of the first `count` real images: what a perfect generator would have."""
    rows = real.data.rows[:count]
    images = real.data.composite(slice(0, len(rows)))
    return {"generator": "real images", **caption_figures(images, rows, real)}


def diversity(
    sampler: Sampler, teacher: Teacher, real: Reference, options: GeneratorEvaluationOptions
) -> float:
    """`sample_diversity` of a generator over captions at equal distances in the split."""
    texts = [real.data.rows[i * len(real.data) // options.captions]["text"] for i in range(options.captions)]
    repeated = [text for text in texts for _ in range(options.each)]
    samples = generate(teacher, repeated, sampler, options.batch, options.seed + 1)
    return sample_diversity(real.graders.features(samples.images), options.each)


def cached_rows(
    samplers: Sequence[Sampler],
    teacher: Teacher,
    real: Reference,
    options: GeneratorEvaluationOptions,
    query: Mapping[str, Any],
    folder: Path | str,
) -> Iterator[dict[str, Any]]:
    """The figures of each generator, kept in `folder` as JSON beside a PNG of its first images.

    query: what the figures depend on beside the weights; a row of the same weights and query is not computed
    again.
    """

    def compute(sampler: Sampler, path: Path) -> dict[str, Any]:
        figures, images = evaluate_generator(sampler, teacher, real, options)
        save_png(path.with_suffix(".png"), image_grid(images, 8))
        return {**figures, "machine": machine_info()}

    for sampler in samplers:
        path = Path(folder) / f"{slug(sampler.name)}.json"
        row = {"weights": fingerprint(sampler.network), **query}
        yield cached_row(path, row, partial(compute, sampler, path))


def format_row(row: Mapping[str, Any]) -> str:
    """The figures of a row on one line."""
    figures = {name: value for name, value in row.items() if isinstance(value, int | float | str)}
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else str(value) for name, value in figures.items()
    )
