"""The closed-form teacher: a Gaussian mixture behind the contract of every score model.

With x0 ~ sum_k w_k N(m_k, diag s_k^2), x_t is again a mixture, of N(alpha m_k, alpha^2 s_k^2 + sigma^2). Its
posterior means of x0 and eps are sums over responsibilities (Song et al. 2021, arXiv:2011.13456, for the
score they add up to).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule
from distill.core.score import Prediction, ScoreModel
from distill.runtime.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """K components of points (C, H, W): means and stds (K, C, H, W), weights (K,) that sum to 1, K class
    names.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        sizes = {len(self.means), len(self.weights)}
        if self.means.ndim != 4 or self.stds.shape != self.means.shape or sizes != {len(self.labels)}:
            raise UserError("a mixture needs means and stds (K, C, H, W), K weights and K labels")
        normalised = bool((self.weights >= 0).all()) and abs(float(self.weights.sum()) - 1) <= 1e-6
        if not bool((self.stds > 0).all()) or not normalised:
            raise UserError("a mixture needs positive stds, and weights of at least 0 that sum to 1")

    def class_weights(self, label: str) -> Tensor:
        """Weights (K,) given a class; the empty label is the whole mixture. Raises `UserError` for an unknown
        class.
        """
        if not label:
            return self.weights
        member = torch.tensor([name == label for name in self.labels], device=self.weights.device)
        weights = self.weights * member
        if float(weights.sum()) == 0:
            raise UserError(
                f"the mixture has no class {label!r}: it has {', '.join(sorted(set(self.labels)))}"
            )
        return weights / weights.sum()

    def log_density(self, x: Tensor, weights: Tensor) -> Tensor:
        """log p (B,) of clean points (B, C, H, W) for component weights (K,), float64."""
        one = torch.ones(len(x), 1, 1, 1, dtype=torch.float64)
        return _log_joint(self, x.double(), one, 0 * one, weights[None])[0].logsumexp(1)


def ring(modes: int = 8, radius: float = 1.0, std: float = 0.08, classes: int = 4) -> Mixture:
    """Points in the plane (2, 1, 1): equal modes on a circle, the classes `c0`, `c1`, ... in turn."""
    angle = torch.arange(modes, dtype=torch.float64) * (2 * torch.pi / modes)
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)[..., None, None]
    labels = tuple(f"c{i % classes}" for i in range(modes))
    weights = torch.full((modes,), 1 / modes, dtype=torch.float64)
    return Mixture(means, torch.full_like(means, std), weights, labels)


@final
class MixtureTeacher(ScoreModel):
    """A mixture as a teacher. An embedding (B, 1, K) holds each sample's component weights; prompts are class
    names.
    """

    def __init__(self, mixture: Mixture, schedule: NoiseSchedule) -> None:
        self.mixture, self.schedule = mixture, schedule

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.mixture.means.shape[1:]
        return channels, height, width

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Component weights (B, 1, K), float64; the empty prompt is the whole mixture."""
        return Conditioning(torch.stack([self.mixture.class_weights(prompt) for prompt in prompts])[:, None])

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """As of every score model, in float64 and exact at every level, the first and the last included."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        weights = conditioning.embedding[:, 0]
        x0, eps = posterior_means(self.mixture, x_t.double(), alpha.double(), sigma.double(), weights)
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        return Prediction(x0.to(dtype), eps.to(dtype), alpha, sigma)

    def log_density(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """log p_t (B,) of x_t (B, C, H, W), float64, differentiable."""
        alpha, sigma = self.schedule.alpha(t).double(), self.schedule.sigma(t).double()
        log_joint, _ = _log_joint(self.mixture, x_t.double(), alpha, sigma, conditioning.embedding[:, 0])
        return log_joint.logsumexp(1)

    def sample(self, conditioning: Conditioning, generator: torch.Generator) -> Tensor:
        """Exact clean samples (B, C, H, W), float64, one for each row of the conditioning."""
        component = torch.multinomial(conditioning.embedding[:, 0], 1, generator=generator)[:, 0]
        noise = torch.randn(len(component), *self.latent_shape, generator=generator, dtype=torch.float64)
        return self.mixture.means[component] + self.mixture.stds[component] * noise


def _log_joint(
    mixture: Mixture, x_t: Tensor, alpha: Tensor, sigma: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """log of weight times density of each component (B, K), and the components' variances (B, K, C, H, W)."""
    variance = alpha[:, None] ** 2 * mixture.stds.double() ** 2 + sigma[:, None] ** 2
    distance = (x_t[:, None] - alpha[:, None] * mixture.means.double()) ** 2 / variance
    log_normal = -0.5 * (distance + variance.log() + torch.log(torch.tensor(2 * torch.pi))).flatten(2).sum(2)
    return log_normal + weights.double().log(), variance


def posterior_means(
    mixture: Mixture, x_t: Tensor, alpha: Tensor, sigma: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """E[x0 | x_t] and E[eps | x_t], each (B, C, H, W), for weights (B, K); neither divides by alpha or
    sigma.
    """
    log_joint, variance = _log_joint(mixture, x_t, alpha, sigma, weights)
    responsibility = log_joint.softmax(1)[..., None, None, None]
    residual = (x_t[:, None] - alpha[:, None] * mixture.means.double()) / variance
    x0 = mixture.means.double() + alpha[:, None] * mixture.stds.double() ** 2 * residual
    return (responsibility * x0).sum(1), (responsibility * sigma[:, None] * residual).sum(1)
