"""The contract of every score model: noisy latents, times and a condition in; eps, x0, v and score out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from distill.core.noise import NoiseSchedule, PredictionType, clean_and_noise


@final
@dataclass(frozen=True)
class Prediction:
    """One prediction (B, C, H, W) seen four ways; alpha and sigma are (B, 1, 1, 1)."""

    x0: Tensor
    eps: Tensor
    alpha: Tensor
    sigma: Tensor

    @staticmethod
    def of(
        output: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, kind: PredictionType
    ) -> "Prediction":
        """From a network's answer of the given kind."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return Prediction(*clean_and_noise(output, x_t, alpha, sigma, kind), alpha, sigma)

    @property
    def v(self) -> Tensor:
        """Velocity alpha eps - sigma x0."""
        return self.alpha * self.eps - self.sigma * self.x0

    @property
    def flow(self) -> Tensor:
        """Velocity eps - x0 of the straight path (1 - time) x0 + time eps."""
        return self.eps - self.x0

    @property
    def score(self) -> Tensor:
        """Gradient of log p_t: -eps / sigma."""
        return -self.eps / self.sigma

    def chunk(self, count: int) -> list["Prediction"]:
        """Equal parts along the batch."""
        fields = (self.x0, self.eps, self.alpha, self.sigma)
        return [Prediction(*part) for part in zip(*(value.chunk(count) for value in fields), strict=True)]

    def with_eps(self, eps: Tensor) -> "Prediction":
        """The prediction at the same x_t that answers this eps."""
        x_t = self.alpha * self.x0 + self.sigma * self.eps
        return Prediction((x_t - self.sigma * eps) / self.alpha, eps, self.alpha, self.sigma)

    def with_x0(self, x0: Tensor) -> "Prediction":
        """The prediction at the same x_t that answers this x0."""
        x_t = self.alpha * self.x0 + self.sigma * self.eps
        return Prediction(x0, (x_t - self.alpha * x0) / self.sigma, self.alpha, self.sigma)

    def extrapolate(self, other: "Prediction", scale: float) -> "Prediction":
        """self + scale (other - self): guidance, when self is unconditional. x0, eps and v are linear in one another."""
        mix = [a + scale * (b - a) for a, b in ((self.x0, other.x0), (self.eps, other.eps))]
        return Prediction(mix[0], mix[1], self.alpha, self.sigma)


class ScoreModel(ABC):
    """Anything that answers which way is more likely. `schedule` says what t means."""

    schedule: NoiseSchedule

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """Prediction for x_t (B, C, H, W) at integer times (B,) under conditions (B, ...). One network call."""


@final
class NFECounter(ScoreModel):
    """A model that counts what it is asked: `nfe` samples so far, in network calls `calls`."""

    def __init__(self, model: ScoreModel) -> None:
        self.model, self.schedule = model, model.schedule
        self.calls = self.nfe = 0

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """As the contract says."""
        self.calls, self.nfe = self.calls + 1, self.nfe + len(x_t)
        return self.model.predict(x_t, t, condition)


@final
class Guided(ScoreModel):
    """Classifier-free guidance eps_0 + s (eps_c - eps_0) (Ho & Salimans 2022, arXiv:2207.12598, this project's s), in one batched call."""

    def __init__(self, model: ScoreModel, unconditional: Tensor, scale: float) -> None:
        """unconditional (1, ...) is the empty prompt's condition, or a negative prompt's; s = 1 never asks for it."""
        self.model, self.unconditional, self.scale = model, unconditional, scale
        self.schedule = model.schedule

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """As the contract says."""
        if self.scale == 1:
            return self.model.predict(x_t, t, condition)
        both = torch.cat([self.unconditional.expand_as(condition), condition])
        free, bound = self.model.predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        return free.extrapolate(bound, self.scale)
