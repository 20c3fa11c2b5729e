"""The contract of every score model: noisy latents, times and a conditioning in; eps, x0, v and score out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule, PredictionType, clean_and_noise


@final
@dataclass(frozen=True)
class Prediction:
    """One prediction (B, C, H, W) in every parameterisation; alpha and sigma are (B, 1, 1, 1)."""

    x0: Tensor
    eps: Tensor
    alpha: Tensor
    sigma: Tensor

    @staticmethod
    def from_output(
        output: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, prediction_type: PredictionType
    ) -> "Prediction":
        """From a network's output of the given parameterisation."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return Prediction(*clean_and_noise(output, x_t, alpha, sigma, prediction_type), alpha, sigma)

    @property
    def v(self) -> Tensor:
        """Velocity alpha eps - sigma x0."""
        return self.alpha * self.eps - self.sigma * self.x0

    @property
    def flow(self) -> Tensor:
        """Velocity eps - x0 of the linear path (1 - time) x0 + time eps."""
        return self.eps - self.x0

    @property
    def score(self) -> Tensor:
        """Gradient of log p_t: -eps / sigma."""
        return -self.eps / self.sigma

    @property
    def x_t(self) -> Tensor:
        """The noisy input that the prediction belongs to."""
        return self.alpha * self.x0 + self.sigma * self.eps

    def chunk(self, count: int) -> list["Prediction"]:
        """Equal parts along the batch."""
        fields = (self.x0, self.eps, self.alpha, self.sigma)
        return [Prediction(*part) for part in zip(*(value.chunk(count) for value in fields), strict=True)]

    def detach(self) -> "Prediction":
        """The same values without their graph."""
        return Prediction(self.x0.detach(), self.eps.detach(), self.alpha, self.sigma)

    def with_eps(self, eps: Tensor) -> "Prediction":
        """The prediction at the same x_t with another eps."""
        return Prediction((self.x_t - self.sigma * eps) / self.alpha, eps, self.alpha, self.sigma)

    def with_x0(self, x0: Tensor) -> "Prediction":
        """The prediction at the same x_t with another x0."""
        return Prediction(x0, (self.x_t - self.alpha * x0) / self.sigma, self.alpha, self.sigma)

    def extrapolate(self, other: "Prediction", scale: float | Tensor) -> "Prediction":
        """self + scale (other - self): guidance, when self is unconditional. x0, eps and v are linear in one
        another. scale: one, or (B, 1, 1, 1).
        """
        x0, eps = (a + scale * (b - a) for a, b in ((self.x0, other.x0), (self.eps, other.eps)))
        return Prediction(x0, eps, self.alpha, self.sigma)


class ScoreModel(ABC):
    """Anything that provides a score estimate at integer times of its noise schedule."""

    schedule: NoiseSchedule

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """Prediction for x_t (B, C, H, W) at integer times (B,) under a conditioning of B rows. One network
        call.
        """


@final
class NFECounter(ScoreModel):
    """A model that counts its function evaluations: `nfe` in samples, `calls` in batched network calls."""

    def __init__(self, model: ScoreModel) -> None:
        self.model, self.schedule = model, model.schedule
        self.calls = self.nfe = 0

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """As of every score model."""
        self.calls, self.nfe = self.calls + 1, self.nfe + len(x_t)
        return self.model.predict(x_t, t, conditioning)


def guidance_nfe(scale: float) -> int:
    """Function evaluations of a guided prediction: one where either part of it has no weight."""
    return 1 if scale in (0, 1) else 2


@final
class Guided(ScoreModel):
    """Classifier-free guidance eps_uncond + s (eps_cond - eps_uncond), in one batched call.

    Ho & Salimans 2022, arXiv:2207.12598, whose w is s - 1.
    """

    def __init__(self, model: ScoreModel, uncond: Conditioning, scale: float | Tensor) -> None:
        """uncond (one row) is that of the empty prompt or of a negative prompt; s = 1 does not evaluate it,
        s = 0 nothing else.

        What it lacks of the other's extras it takes from there, and the groups of views: guidance is by text
        and keeps the camera (MVDream, arXiv:2308.16512). scale: s, or one a sample (B,).
        """
        self.model, self.uncond, self.scale = model, uncond, scale
        self.schedule = model.schedule

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """As of every score model."""
        scale = self.scale
        if isinstance(scale, Tensor):
            scale = scale[:, None, None, None]
        elif scale == 1:
            return self.model.predict(x_t, t, conditioning)

        uncond_rows = self.uncond.expand(len(conditioning)).grouped(conditioning.views)
        uncond_rows = uncond_rows.with_extras(**{**conditioning.extras, **uncond_rows.extras})
        if not isinstance(scale, Tensor) and scale == 0:
            return self.model.predict(x_t, t, uncond_rows)
        batch = Conditioning.cat([uncond_rows, conditioning])
        uncond, cond = self.model.predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), batch).chunk(2)
        return uncond.extrapolate(cond, scale)
