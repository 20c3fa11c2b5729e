"""What a distillation monitors: Fréchet distance, diversity and saturation of samples, and when a run has
diverged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.evaluation.metrics import Moments, frechet_distance, moments, sample_diversity, saturation
from distill.runtime.errors import UserError
from distill.runtime.sharding import local_part


@dataclass(frozen=True)
class MonitorOptions:
    """What is sampled how often, and the bounds beyond which a run has diverged and is rolled back."""

    every: int = 100  # cycles between two evaluations; 0: never, which needs neither grader nor real images
    captions: int = 256
    samples_per_caption: int = 2
    real: int = 2000  # real images that the samples are compared with
    chunk: int | None = None  # images in memory at a time, samples and real ones; null: all
    max_fid_ratio: float = 4.0  # of the Fréchet distance to the best so far
    min_diversity_ratio: float = 0.2  # of the diversity of a caption's samples to the best so far
    max_saturation: float = 1.5  # over that of real images; beyond it a warning is printed
    max_rollbacks: int = 3  # after so many the run stops

    def __post_init__(self) -> None:
        counts = min(self.captions, self.every + 1, 1 if self.chunk is None else self.chunk) >= 1
        counts = counts and min(self.samples_per_caption, self.real) >= 2
        if not counts or self.max_fid_ratio <= 1 or not 0 <= self.min_diversity_ratio < 1:
            raise UserError(
                "a monitor needs captions and chunk of at least 1, samples_per_caption and real of at least "
                "2, every of at least 0, max_fid_ratio above 1 and min_diversity_ratio in [0, 1)"
            )


LEAST_SATURATION = 0.01  # of real images: grey ones have 0


@dataclass
class Monitor:
    """Compares samples with real latents in the features of a network."""

    real: Moments
    real_saturation: float
    grade: Callable[
        [Tensor], tuple[Tensor, Tensor]
    ]  # latents (N, C, h, w) to features (N, D), saturation (N,)
    options: MonitorOptions
    best: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # all that were printed, for the report

    def evaluate(self, latents: Tensor) -> dict[str, float]:
        """Metrics of samples (captions * samples_per_caption, C, h, w), those of one caption consecutive."""
        if not bool(latents.isfinite().all()):
            return {"frechet": math.nan, "diversity": math.nan, "saturation": math.nan}
        features, saturations = self.grade(latents)
        return {
            "frechet": frechet_distance(moments(features), self.real),
            "diversity": sample_diversity(features, self.options.samples_per_caption),
            "saturation": float(saturations.mean()) / max(self.real_saturation, LEAST_SATURATION),
        }

    def check_divergence(self, metrics: dict[str, float]) -> str | None:
        """Why the run has diverged; None where it has not, and the best metrics are updated."""
        frechet, diversity = metrics["frechet"], metrics["diversity"]
        best_frechet, best_diversity = self.best.get("frechet", math.inf), self.best.get("diversity", 0.0)
        if not all(math.isfinite(value) for value in metrics.values()):
            return "samples are not finite"
        if frechet > self.options.max_fid_ratio * best_frechet:
            return f"the Fréchet distance rose from {best_frechet:.3g} to {frechet:.3g}"
        if diversity < self.options.min_diversity_ratio * best_diversity:
            return f"the diversity of one caption's samples fell from {best_diversity:.3g} to {diversity:.3g}"

        if metrics["saturation"] > self.options.max_saturation:
            ratio = f"{metrics['saturation']:.2f}"
            self.warnings.append(
                f"samples are {ratio} times as saturated as real ones: lower the teacher's guidance"
            )
        self.best = {"frechet": min(frechet, best_frechet), "diversity": max(diversity, best_diversity)}
        return None

    def state_dict(self) -> dict[str, Any]:
        """The best metrics and all warnings so far."""
        return {"best": dict(self.best), "warnings": list(self.warnings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over such a state."""
        self.best, self.warnings = dict(state["best"]), list(state["warnings"])


def grade_in_chunks(
    decode: Callable[[Tensor], Tensor], features: Callable[[Tensor], Tensor], chunk: int | None
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Latents (N, C, h, w) to features (N, D) and saturation (N,) of their images, `chunk` at a time."""

    def grade(latents: Tensor) -> tuple[Tensor, Tensor]:
        graded = []
        for part in latents.split(chunk or len(latents)):
            images = decode(part)
            graded.append((features(images), saturation(images)))
        columns = [torch.cat(column) for column in zip(*graded, strict=True)]
        return columns[0], columns[1]

    return grade


@torch.no_grad()
def finite(tensors: list[Tensor]) -> Tensor:
    """Whether every element is finite, by one sum a tensor: a boolean on their device.

    Of sharded tensors, what this process holds.
    """
    return torch.stack([local_part(value.detach()).float().sum() for value in tensors]).isfinite().all()
