"""What a distillation looks at on its way: Frechet distance, spread and saturation of samples; what counts as having diverged."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.evaluation.metrics import Moments, frechet_distance, moments
from distill.runtime.errors import UserError

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MonitorOptions:
    """A look every `every` cycles at `captions` x `each` samples.

    Diverged: a figure is not finite, the distance is above `worse` times the best so far, or the spread of one caption's samples below
    `collapse` of the best so far. Saturation above `saturation` times that of real images is said, not mended.
    """

    every: int = 100
    captions: int = 256
    each: int = 2
    worse: float = 4.0
    collapse: float = 0.2
    saturation: float = 1.5
    rollbacks: int = 3  # after so many the run stops

    def __post_init__(self) -> None:
        if (
            min(self.every, self.captions) < 1
            or self.each < 2
            or self.worse <= 1
            or not 0 <= self.collapse < 1
        ):
            raise UserError(
                "a monitor needs a period, captions and two samples of each; worse above 1, collapse within [0, 1)"
            )


@dataclass
class Monitor:
    """Compares samples with real latents in some features."""

    real: Moments
    decode: Callable[[Tensor], Tensor]  # latents (N, C, h, w) to what is looked at, once a look
    features: Features  # of what is looked at: (N, D)
    saturation: Callable[[Tensor], float]  # of what is looked at, over that of real ones
    options: MonitorOptions
    best: dict[str, float]
    alarms: list[str] = field(default_factory=list)  # what was said, for the report

    def look(self, latents: Tensor) -> dict[str, float]:
        """Figures of samples (captions * each, C, h, w), those of one caption beside one another."""
        if not bool(latents.isfinite().all()):
            return {"frechet": math.nan, "spread": math.nan, "saturation": math.nan}
        seen = self.decode(latents)
        told = self.features(seen)
        groups = told.reshape(-1, self.options.each, told.shape[1])
        spread = float((groups - groups.mean(1, keepdim=True)).square().sum(2).mean().sqrt())
        return {
            "frechet": frechet_distance(moments(told), self.real),
            "spread": spread,
            "saturation": self.saturation(seen),
        }

    def judge(self, figures: dict[str, float]) -> str | None:
        """Why the run has diverged; None, and the best figures are kept, where it has not."""
        if not all(math.isfinite(value) for value in figures.values()):
            return "samples are not finite"
        if figures["frechet"] > self.options.worse * self.best.get("frechet", math.inf):
            return f"the Frechet distance rose from {self.best['frechet']:.3g} to {figures['frechet']:.3g}"
        if figures["spread"] < self.options.collapse * self.best.get("spread", 0.0):
            return f"the spread of one caption's samples fell from {self.best['spread']:.3g} to {figures['spread']:.3g}"
        if figures["saturation"] > self.options.saturation:
            self.alarms.append(
                f"samples are {figures['saturation']:.2f} times as saturated as real ones: lower the teacher's guidance"
            )
        self.best["frechet"] = min(figures["frechet"], self.best.get("frechet", math.inf))
        self.best["spread"] = max(figures["spread"], self.best.get("spread", 0.0))
        return None

    def state_dict(self) -> dict[str, Any]:
        """The best figures and alarms so far."""
        return {"best": dict(self.best), "alarms": list(self.alarms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self.best, self.alarms = dict(state["best"]), list(state["alarms"])


@torch.no_grad()
def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every number is finite, by one number a tensor."""
    return bool(torch.stack([value.float().sum() for value in tensors]).isfinite().all())
