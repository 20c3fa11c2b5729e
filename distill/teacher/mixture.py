"""The oracle: a Gaussian mixture behind the contract of every score model, all of its answers in closed form.

With x0 ~ sum_k w_k N(m_k, diag s_k^2), the noisy x_t is again a mixture, of N(alpha m_k, alpha^2 s_k^2 + sigma^2); its posterior
means of x0 and eps are sums over responsibilities (Song et al. 2021, arXiv:2011.13456, for the score they add up to).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from distill.core.noise import NoiseSchedule
from distill.core.score import Prediction, ScoreModel
from distill.runtime.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """K components of points shaped (C, H, W): means (K, C, H, W), stds the same, weights (K,) that sum to 1, a class name each."""

    means: Tensor
    stds: Tensor
    weights: Tensor
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.labels)
        if (
            self.means.ndim != 4
            or self.stds.shape != self.means.shape
            or {len(self.means), len(self.weights)} != {count}
        ):
            raise UserError("a mixture needs means and stds (K, C, H, W), K weights and K labels")
        if (
            not bool((self.stds > 0).all())
            or not bool((self.weights >= 0).all())
            or abs(float(self.weights.sum()) - 1) > 1e-6
        ):
            raise UserError(
                "a mixture's stds must be positive and its weights must be at least 0 and sum to 1"
            )

    def of(self, label: str) -> Tensor:
        """Weights (K,) given a class; the empty label is the whole mixture. Raises `UserError` for a class there is not."""
        if not label:
            return self.weights
        chosen = self.weights * torch.tensor(
            [own == label for own in self.labels], device=self.weights.device
        )
        if float(chosen.sum()) == 0:
            raise UserError(
                f"the mixture has no class {label!r}: it has {', '.join(sorted(set(self.labels)))}"
            )
        return chosen / chosen.sum()

    def log_density(self, x: Tensor, weights: Tensor) -> Tensor:
        """log p (B,) of clean points (B, C, H, W) for component weights (K,), float64."""
        one = torch.ones(len(x), 1, 1, 1, dtype=torch.float64)
        return _log_parts(self, x.double(), one, 0 * one, weights[None])[0].logsumexp(1)


def ring(modes: int = 8, radius: float = 1.0, std: float = 0.08, classes: int = 4) -> Mixture:
    """Points in the plane, shaped (2, 1, 1): equal modes on a circle, the class `c0`, `c1`, ... going round."""
    angle = torch.arange(modes, dtype=torch.float64) * (2 * torch.pi / modes)
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)[..., None, None]
    labels = tuple(f"c{i % classes}" for i in range(modes))
    return Mixture(
        means, torch.full_like(means, std), torch.full((modes,), 1 / modes, dtype=torch.float64), labels
    )


@final
class MixtureTeacher(ScoreModel):
    """A mixture as a teacher. A condition (B, 1, K) holds each sample's component weights; prompts are class names."""

    def __init__(self, mixture: Mixture, schedule: NoiseSchedule) -> None:
        self.mixture, self.schedule = mixture, schedule

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.mixture.means.shape[1:]
        return channels, height, width

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Component weights (B, 1, K), float64; the empty prompt is the whole mixture."""
        return torch.stack([self.mixture.of(prompt) for prompt in prompts])[:, None]

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """As the contract says, computed in float64 and exact at every level, the first and the last included."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        wide = torch.promote_types(x_t.dtype, torch.float32)
        x0, eps = posterior_means(self.mixture, x_t.double(), alpha.double(), sigma.double(), condition[:, 0])
        return Prediction(x0.to(wide), eps.to(wide), alpha, sigma)

    def log_density(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """log p_t (B,) of x_t (B, C, H, W), float64, differentiable."""
        parts, _ = _log_parts(
            self.mixture,
            x_t.double(),
            self.schedule.alpha(t).double(),
            self.schedule.sigma(t).double(),
            condition[:, 0],
        )
        return parts.logsumexp(1)

    def sample(self, condition: Tensor, generator: torch.Generator) -> Tensor:
        """Exact clean samples (B, C, H, W), float64, one for each condition (B, 1, K)."""
        chosen = torch.multinomial(condition[:, 0], 1, generator=generator)[:, 0]
        noise = torch.randn(len(chosen), *self.latent_shape, generator=generator, dtype=torch.float64)
        return self.mixture.means[chosen] + self.mixture.stds[chosen] * noise


def _log_parts(
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
    """E[x0 | x_t] and E[eps | x_t], each (B, C, H, W), for weights (B, K); neither divides by alpha or sigma."""
    parts, variance = _log_parts(mixture, x_t, alpha, sigma, weights)
    share = parts.softmax(1)[..., None, None, None]
    residual = (x_t[:, None] - alpha[:, None] * mixture.means.double()) / variance
    x0 = mixture.means.double() + alpha[:, None] * mixture.stds.double() ** 2 * residual
    return (share * x0).sum(1), (share * sigma[:, None] * residual).sum(1)
