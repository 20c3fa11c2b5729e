"""Evaluation of a teacher on held-out images and captions: its CLIP, its VAE, its samples by guidance."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.core.teacher import Teacher
from distill.data.folders import CaptionedImages
from distill.evaluation.clip import ClipScorer, caption_retrieval
from distill.evaluation.denoising import denoising_figures, poses_of
from distill.evaluation.evaluation_set import EvaluationSet
from distill.evaluation.generate import generate_batches, teacher_sampler
from distill.evaluation.judge_columns import label_of
from distill.evaluation.labels import LabelOptions, Row, fill_caption, fractions, template_columns
from distill.evaluation.readings import PREVIEW, image_batches, read_images
from distill.evaluation.rows import cached_row
from distill.runtime.checkpoint import fingerprint
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path
from distill.runtime.images import image_grid, save_png
from distill.teacher.vae import psnr

DENOISED = 500  # images of which denoising errors are means, at seven noise levels
CAPTION, CAMERA = "caption", "caption and camera"  # what samples are conditioned on


@dataclass(frozen=True)
class EvaluationOptions:
    """What is sampled: `samples` images of the captions in turn at each guidance scale, by DDIM."""

    samples: int = 500
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 7.5)
    steps: int = 25
    pairs: int = 300  # further samples, of captions of two things, where there is a judge of pairs
    seed: int = 0
    batch: int = 50

    def __post_init__(self) -> None:
        if self.samples < 2 or min(self.steps, self.batch) < 1 or self.pairs < 0 or not self.guidance:
            raise UserError(
                "samples must be at least 2, steps and batch must be positive, pairs 0 or more, guidance not "
                "empty"
            )


def evaluate_teacher(
    teacher: Teacher,
    clip: ClipScorer | None,
    test: EvaluationSet,
    options: EvaluationOptions,
    folder: Path,
    query: Mapping[str, Any],
) -> dict[str, Any]:
    """All figures of a teacher on a test set; samples.png in `folder`, of the best row of samples.

    The best row has the highest joint accuracy, else the lowest Frechet distance. Rows are kept in `folder`
    and not computed again: `query` is what they depend on beside the weights and the options. A teacher that
    is conditioned on cameras has rows with the captions alone and with the images' own cameras, where the
    data states them. `clip` is the teacher's own.
    """
    weights = {"network": fingerprint(teacher.denoiser.network), "encoders": teacher.fingerprint()}
    sampled = {name: vars(options)[name] for name in ("samples", "pairs", "steps", "seed")}
    query = {**weights, **query, **sampled}
    parts = cached_row(folder / "parts.json", query, lambda: part_figures(teacher, clip, test))
    rows = list(sample_rows(teacher, test, options, folder, query))
    best = max(rows, key=lambda row: row.get(test.graders.labels.joint_name, -row["frechet"]))
    with atomic_path(folder / "samples.png") as temporary:
        temporary.write_bytes(_row_path(folder, best).with_suffix(".png").read_bytes())
    return {**_without(parts, query), "samples": rows}


def _without(row: Mapping[str, Any], query: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in query}


def part_figures(teacher: Teacher, clip: ClipScorer | None, test: EvaluationSet) -> dict[str, Any]:
    """Figures of CLIP, VAE and denoiser, and the judges' accuracy on real and reconstructed images."""
    graders, labels = test.graders, test.graders.labels
    errors: list[Tensor] = []
    readings = read_images(reconstruct(teacher, test.data, errors), graders.common)
    accuracy = readings.accuracy(graders.common, test.data.rows, labels)
    pairs = graders.pair_figures(reconstruct(teacher, test.pairs, []), test.pairs)
    error = torch.cat(errors)
    denoised = test.data.select(range(min(DENOISED, len(test.data))))
    return {
        "clip": {} if clip is None else zero_shot(clip, test.data, labels),
        "vae": {"psnr": float(psnr(error.mean())), "psnr_mean_over_images": float(psnr(error).mean())},
        "judge_accuracy": {
            "real": {**test.figures["one"], **test.figures["two"]},
            "reconstructions": {**accuracy, **pairs},
        },
        "frechet": {
            "real_count": test.count,
            "floor": test.floor,
            "floor_counts": test.floor_counts,
            "reconstructions": test.frechet(readings),
        },
        "denoising_error": denoising_figures(teacher, denoised, denoised.composite(slice(None))),
    }


@torch.no_grad()
def reconstruct(
    teacher: Teacher, data: CaptionedImages, errors: list[Tensor], batch: int = 64
) -> Iterator[Tensor]:
    """Images (B, 3, H, W) in [0, 1] encoded to latents and decoded, on the CPU.

    Their mean squared errors (B,) are appended to `errors`.
    """
    for images in image_batches(data, batch):
        restored = teacher.decode(teacher.encode_images(images.to(teacher.device))).cpu()
        errors.append((restored - images).square().flatten(1).mean(1))
        yield restored


def sample_rows(
    teacher: Teacher, test: EvaluationSet, options: EvaluationOptions, folder: Path, query: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Figures of samples, one row a guidance scale and condition, each with a PNG of its first images."""
    with_camera = teacher.conditioned_on_cameras and poses_of(test.data) is not None
    for scale in options.guidance:
        for condition in (CAPTION, CAMERA) if with_camera else (CAPTION,):
            row = {"guidance": scale, "condition": condition}
            path = _row_path(folder, row)
            compute = partial(sample_figures, teacher, test, options, scale, condition, path)
            yield _without(cached_row(path, {**query, **row}, compute), query)


def _row_path(folder: Path, row: Mapping[str, Any]) -> Path:
    return folder / f"guidance-{row['guidance']:g}-{row['condition'].replace(' ', '-')}.json"


def sample_figures(
    teacher: Teacher,
    test: EvaluationSet,
    options: EvaluationOptions,
    scale: float,
    condition: str,
    path: Path,
) -> dict[str, Any]:
    """Figures of the samples of one guidance scale; their first images go beside `path`, as PNG."""
    graders = test.graders

    def samples(data: CaptionedImages) -> Iterator[Tensor]:
        poses = poses_of(data) if condition == CAMERA else None
        sampler = teacher_sampler(teacher, options.steps, scale, poses)
        parts = generate_batches(teacher, data.texts, sampler, options.batch, options.seed)
        return (part.images for part in parts)

    prompts = test.data.select([i % len(test.data) for i in range(options.samples)])
    readings = read_images(samples(prompts), graders.common)
    save_png(path.with_suffix(".png"), image_grid(readings.preview, 12))
    figures = {
        **readings.accuracy(graders.common, prompts.rows, graders.labels),
        **readings.clip_figures(graders.common, prompts.texts),
        "frechet": test.frechet(readings),
    }
    pairs = test.pairs.select(range(min(options.pairs, len(test.pairs))))
    if graders.pair_judge is None or not len(pairs):
        return figures
    preview: list[Tensor] = []
    figures |= graders.pair_figures(_recorded(samples(pairs), preview), pairs)
    save_png(path.with_name(f"{path.stem}-pairs.png"), image_grid(torch.cat(preview)[:PREVIEW], 12))
    return figures


def _recorded(batches: Iterator[Tensor], record: list[Tensor]) -> Iterator[Tensor]:
    """The batches as they are, each appended to `record` too."""
    for images in batches:
        record.append(images)
        yield images


@torch.no_grad()
def zero_shot(clip: ClipScorer, data: CaptionedImages, labels: LabelOptions) -> dict[str, float]:
    """CLIP's accuracy as a zero-shot classifier of the columns in `labels.caption`; its text retrieval."""
    features = torch.cat([clip.image_features(images) for images in image_batches(data)])
    accuracy = class_accuracy(clip, features, data.rows, labels)
    return {**accuracy, **caption_retrieval(clip, features, data.texts)}


def class_accuracy(
    clip: ClipScorer, features: Tensor, rows: Sequence[Row], labels: LabelOptions
) -> dict[str, float]:
    """Zero-shot accuracy of image features (N, D) by column; empty where the data lacks the columns.

    A class is a combination of the caption's columns that occurs. Its feature is the mean over its captions
    without and with each detail (prompt ensembling, arXiv:2103.00020, section 3.1.4); the detail is
    classified given the true class.
    """
    columns = template_columns(labels.caption)
    if not columns or any(not row.get(name) for row in rows for name in columns):
        return {}
    of_row = [tuple(row[name] for name in columns) for row in rows]
    classes = sorted(set(of_row))
    detail = next(iter(template_columns(labels.caption_detail)), "")
    values = sorted({row[detail] for row in rows if row.get(detail)})
    endings = ["", *(labels.caption_detail.format(**{detail: value}) for value in values)]
    captions = [fill_caption(labels.caption, dict(zip(columns, each, strict=True))) for each in classes]
    prompts = [caption + ending for caption in captions for ending in endings]
    table = clip.text_features(prompts).unflatten(0, (len(classes), len(endings)))

    predictions = [classes[i] for i in (features @ table.mean(1).T).argmax(1).tolist()]
    hits: dict[str, list[bool | None]] = {
        name: [p[i] == target[i] for p, target in zip(predictions, of_row, strict=True)]
        for i, name in enumerate(columns)
    }
    if values:
        targets = [classes.index(each) for each in of_row]
        nearest = torch.einsum("nd,nvd->nv", features, table[targets, 1:]).argmax(1).tolist()
        truth = [label_of(row, detail, labels.only_if) for row in rows]
        hits[detail] = [
            None if label is None else values[i] == label for i, label in zip(nearest, truth, strict=True)
        ]
    return fractions(hits)
