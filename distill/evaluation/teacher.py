"""Evaluation of a teacher on held-out images and captions: its CLIP, its VAE, its samples by guidance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.core.teacher import Teacher
from distill.data.folders import CaptionedImages
from distill.evaluation.clip import ClipScorer
from distill.evaluation.denoising import denoising_figures
from distill.evaluation.generate import generate, teacher_sampler
from distill.evaluation.graders import Graders
from distill.evaluation.judge import label_of
from distill.evaluation.labels import LabelOptions, fill_caption, fractions, template_columns
from distill.evaluation.metrics import frechet_distance, moments
from distill.runtime.errors import UserError
from distill.teacher.vae import psnr


@dataclass(frozen=True)
class EvaluationOptions:
    """What is sampled: the first `samples` captions at each guidance scale, by DDIM in `steps` steps."""

    samples: int = 500
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 7.5)
    steps: int = 25
    seed: int = 0
    batch: int = 50

    def __post_init__(self) -> None:
        if self.samples < 2 or min(self.steps, self.batch) < 1 or not self.guidance:
            raise UserError(
                "samples must be at least 2, steps and batch must be positive, guidance not empty"
            )


def evaluate_teacher(
    teacher: Teacher,
    graders: Graders,
    data: CaptionedImages,
    options: EvaluationOptions,
    labels: LabelOptions,
) -> tuple[dict[str, Any], Tensor]:
    """All figures of a teacher on a test split, and samples (S, 3, H, W) at the best guidance scale.

    The best scale has the highest joint accuracy, else the lowest Frechet distance. Raises `UserError`
    where `labels.exclude_if` leaves fewer than four rows, or the graders have no features.
    """
    data = data.select(labels.labelled(data.rows))
    if len(data) < 4:
        excluded = f" without {labels.exclude_if}" if labels.exclude_if else ""
        raise UserError(f"the test split has {len(data)} rows{excluded}: at least 4 are needed")

    images = data.composite(slice(None))
    restored = reconstruct(teacher, images)
    error = (restored - images).square()
    features = graders.features(images)
    real = moments(features)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    figures: dict[str, Any] = {
        "clip": {} if graders.clip is None else zero_shot(graders.clip, data, images, labels),
        "vae": {
            "psnr": float(psnr(error.mean())),
            "psnr_mean_over_images": float(psnr(error.flatten(1).mean(1)).mean()),
        },
        "judge_accuracy": {
            "real": graders.accuracy(images, data.rows, labels),
            "reconstructions": graders.accuracy(restored, data.rows, labels),
        },
        "frechet": {
            "real_halves": frechet_distance(*(moments(features[half]) for half in order.chunk(2))),
            "reconstructions": frechet_distance(moments(graders.features(restored)), real),
        },
    }

    prompts = data.select(range(min(options.samples, len(data))))
    figures["denoising_error"] = denoising_figures(teacher, prompts, images[: len(prompts)])
    figures["samples"], best, quality = [], images[:0], -float("inf")
    for scale in options.guidance:
        sampler = teacher_sampler(teacher, options.steps, scale)
        samples = generate(teacher, prompts.texts, sampler, options.batch, options.seed).images
        row = {
            "guidance": scale,
            **graders.accuracy(samples, prompts.rows, labels),
            **graders.clip_figures(samples, prompts.texts),
            "frechet": frechet_distance(moments(graders.features(samples)), real),
        }
        figures["samples"].append(row)
        if row.get(labels.joint_name, -row["frechet"]) > quality:
            best, quality = samples, row.get(labels.joint_name, -row["frechet"])
    return figures, best


@torch.no_grad()
def reconstruct(teacher: Teacher, images: Tensor, batch: int = 64) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] encoded to latents and decoded, on the CPU."""
    parts = [teacher.decode(teacher.encode_images(part.to(teacher.device))) for part in images.split(batch)]
    return torch.cat([part.cpu() for part in parts])


@torch.no_grad()
def zero_shot(
    clip: ClipScorer, data: CaptionedImages, images: Tensor, labels: LabelOptions
) -> dict[str, float]:
    """CLIP's accuracy as a zero-shot classifier of the columns in `labels.caption`, and its text retrieval.

    Retrieval: the fraction of images whose nearest caption, among all distinct ones, is their own.
    """
    features = clip.image_features(images)
    texts = sorted(set(data.texts))
    nearest = (features @ clip.text_features(texts).T).argmax(1).tolist()
    hits = [texts[n] == row["text"] for n, row in zip(nearest, data.rows, strict=True)]
    return {
        **class_accuracy(clip, features, data.rows, labels),
        **fractions({"retrieval_top1": hits}),
        "retrieval_captions": float(len(texts)),
    }


def class_accuracy(
    clip: ClipScorer, features: Tensor, rows: Sequence[Mapping[str, Any]], labels: LabelOptions
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
