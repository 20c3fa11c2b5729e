"""One algebra of first-order score distillation: g = w(t) * sum_i c_i prediction_i(z_t; condition_i).

The loss handed to autograd is 1/2 |z - stopgrad(z - g)|^2, summed over a sample's elements and averaged over the batch,
so that its gradient on each sample's latent is g / batch: image-space weights then mean the same at every resolution.
A method is data (`ObjectiveOptions`, a YAML file); SDS is `+guided -noise` with w = sigma^2.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.errors import UserError
from distill.score import Prediction, ScoreModel

Predicted = Literal["noise", "conditional", "unconditional", "negative", "guided"]
Weight = Literal["sigma_squared", "one", "alpha_sigma_squared", "sigma_over_alpha"]


@dataclass(frozen=True)
class Term:
    """coefficient * prediction; `scale` is the guidance of `guided`: eps_0 + scale (eps_c - eps_0)."""

    predict: Predicted
    coefficient: float
    scale: float = 1.0

    @property
    def conditions(self) -> tuple[str, ...]:
        """Which of the teacher's conditions the term needs; none for the noise, no unconditional one at scale 1."""
        if self.predict == "noise":
            return ()
        if self.predict == "guided":
            return ("conditional",) if self.scale == 1 else ("unconditional", "conditional")
        return (self.predict,)


@dataclass(frozen=True)
class TimeLaw:
    """t / T is uniform in [low, high], where high goes from high[0] to high[1] over the share `until` of a run.

    `anneal`: linear, or sqrt (HiFA, arXiv:2305.18766, section 3.3), or none (high[0] throughout). `one_time` draws one t a
    batch instead of one a sample.
    """

    low: float = 0.02
    high: tuple[float, float] = (0.98, 0.98)
    anneal: Literal["none", "linear", "sqrt"] = "linear"
    until: float = 1.0
    one_time: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.low <= min(self.high) and max(self.high) <= 1 and 0 < self.until <= 1):
            said = f"times from {self.low} to {list(self.high)} until {self.until}"
            raise UserError(f"{said}: expected 0 <= low <= high <= 1 and 0 < until <= 1")

    def upper(self, progress: float) -> float:
        """The upper end at a share of the run in [0, 1]."""
        share = min(progress / self.until, 1.0)
        share = {"none": 0.0, "linear": share, "sqrt": math.sqrt(share)}[self.anneal]
        return self.high[0] + (self.high[1] - self.high[0]) * share

    def draw(self, count: int, steps: int, progress: float, generator: torch.Generator) -> Tensor:
        """Integer times (count,) on the CPU."""
        share = torch.rand(1 if self.one_time else count, generator=generator).expand(count)
        return ((self.low + (self.upper(progress) - self.low) * share) * (steps - 1)).round().long()


@dataclass(frozen=True)
class ObjectiveOptions:
    """A score-based loss as data. `clip` bounds the norm of each sample's gradient per element's root mean square; 0 is off."""

    terms: tuple[Term, ...]
    weight: Weight = "sigma_squared"
    time: TimeLaw = TimeLaw()
    clip: float = 0.0

    def __post_init__(self) -> None:
        if not self.terms:
            raise UserError("an objective needs at least one term")


@dataclass(frozen=True)
class Conditions:
    """Text states (B, L, D) of the prompts; (1, L, D) of the empty and, where a term asks for it, the negative prompt."""

    conditional: Tensor
    unconditional: Tensor
    negative: Tensor | None = None

    def select(self, name: str) -> Tensor:
        """The states of one kind, one a sample. Raises `UserError` where a term needs a negative prompt and none is given."""
        chosen = {"conditional": self.conditional, "unconditional": self.unconditional, "negative": self.negative}[name]
        if chosen is None:
            raise UserError("the objective has a term with a negative prompt: give negative_prompt")
        return chosen.expand_as(self.conditional)


@dataclass(frozen=True)
class Distilled:
    """A step's outcome: the loss to call backward on, g (B, C, H, W), the times (B,) and the teacher's predictions by condition."""

    loss: Tensor
    gradient: Tensor
    t: Tensor
    predictions: dict[str, Prediction]


class ScoreDistillation:
    """An objective on a frozen score model; call it on latents that are being optimised."""

    def __init__(self, model: ScoreModel, options: ObjectiveOptions) -> None:
        self.model, self.options = model, options
        last = torch.tensor([round(max(options.time.high) * (model.schedule.steps - 1))])
        if options.weight == "sigma_over_alpha" and float(model.schedule.alpha(last)) == 0:
            raise UserError("the weight sigma_over_alpha is infinite at the last level of this schedule: give time.high below 1")
        self.needed = tuple(dict.fromkeys(name for term in options.terms for name in term.conditions))

    def __call__(self, latents: Tensor, conditions: Conditions, progress: float, generator: torch.Generator) -> Distilled:
        """latents (B, C, h, w) with gradient; progress in [0, 1]; noise and times come from the CPU `generator`. One teacher call."""
        schedule = self.model.schedule
        t = self.options.time.draw(len(latents), schedule.steps, progress, generator).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        with torch.no_grad():
            x_t = schedule.add_noise(latents, noise, t)
            predictions = self._predict(x_t, t, conditions)
            total = sum(term.coefficient * _value(term, noise, predictions) for term in self.options.terms)
            gradient = _clip(time_weight(self.options.weight, schedule.alpha(t), schedule.sigma(t)) * total, self.options.clip)
        return Distilled(surrogate_loss(latents, gradient), gradient, t, predictions)

    def _predict(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> dict[str, Prediction]:
        if not self.needed:
            return {}
        count = len(self.needed)
        states = torch.cat([conditions.select(name) for name in self.needed])
        together = self.model.predict(x_t.repeat(count, 1, 1, 1), t.repeat(count), states)
        return dict(zip(self.needed, together.chunk(count), strict=True))


def _value(term: Term, noise: Tensor, predictions: dict[str, Prediction]) -> Tensor:
    if term.predict == "noise":
        return noise
    if term.predict == "guided":
        bound = predictions["conditional"].eps
        return bound if term.scale == 1 else predictions["unconditional"].eps.lerp(bound, term.scale)
    return predictions[term.predict].eps


def time_weight(name: Weight, alpha: Tensor, sigma: Tensor) -> Tensor:
    """w(t) from alpha and sigma (B, 1, 1, 1): the names say what it is."""
    if name == "one":
        return torch.ones_like(sigma)
    if name == "sigma_squared":
        return sigma.square()
    return alpha * sigma.square() if name == "alpha_sigma_squared" else sigma / alpha


def _clip(gradient: Tensor, limit: float) -> Tensor:
    if limit == 0:
        return gradient
    size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    return gradient * (limit / size.clamp_min(limit))


def surrogate_loss(latents: Tensor, gradient: Tensor) -> Tensor:
    """1/2 |z - stopgrad(z - g)|^2, summed over elements, mean over the batch: dL/dz = g / batch."""
    target = (latents - gradient).detach()
    return 0.5 * (latents - target).square().sum() / len(latents)


def text_conditions(encode: Callable[[Sequence[str]], Tensor], prompts: Sequence[str], negative: str = "") -> Conditions:
    """Conditions of prompts, one a sample, through a teacher's `encode_text`."""
    return Conditions(encode(prompts), encode([""]), encode([negative]) if negative else None)
