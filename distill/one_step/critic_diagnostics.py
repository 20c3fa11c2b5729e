"""The critic's error, measured by the orthogonality of an optimal predictor's residual.

If the critic predicts E[eps | x_t] of the student's current outputs, its residual eps - eps_critic is
uncorrelated with every function of x_t. Correlation with some probes of x_t is error that it could still
learn (the normal equations).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.score import ScoreModel
from distill.runtime.checkpoint import ValueState
from distill.runtime.errors import UserError


@dataclass(frozen=True)
class CriticDiagnosticsOptions:
    """How often the critic's error is measured, and whether its update rate adapts to it."""

    every: int = 20  # cycles between two measurements; 0: never
    adapt: bool = False  # one more critic update a cycle above `high`, one less below `low`, within `bounds`
    low: float = 0.01
    high: float = 0.03
    bounds: tuple[int, int] = (1, 10)

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high or not 1 <= self.bounds[0] <= self.bounds[1]:
            raise UserError(
                "critic_diagnostics needs low below high, and bounds of at least 1, low then high"
            )


@dataclass
class CriticUpdateRate(ValueState):
    """The critic's updates a cycle, where they adapt."""

    updates: int


@torch.no_grad()
def critic_error(
    critic: ScoreModel,
    generated: Tensor,
    conditioning: Conditioning,
    generator: torch.Generator,
    others: Mapping[str, ScoreModel],
) -> dict[str, float]:
    """Correlation of the critic's residual with each probe of x_t, on generated latents (B, C, h, w).

    The probes: x_t, the critic's own eps, and the difference of each other model's eps from it. An optimal
    critic has 0 within about 1 / sqrt(B C h w).
    """
    steps = critic.schedule.num_train_timesteps
    t = torch.randint(steps // 50, steps, (len(generated),), generator=generator).to(generated.device)
    noise = torch.randn(generated.shape, generator=generator).to(generated)
    x_t = critic.schedule.add_noise(generated, noise, t)

    eps = critic.predict(x_t, t, conditioning).eps
    probes = {"x_t": x_t, "eps": eps}
    probes |= {name: model.predict(x_t, t, conditioning).eps - eps for name, model in others.items()}
    return {name: _correlation(noise - eps, probe) for name, probe in probes.items()}


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(1), b.double().flatten(1)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-12)
    return float(cosine.mean())


def adapt_updates(updates: int, error: float, options: CriticDiagnosticsOptions) -> int:
    """The number of critic updates a cycle after a measurement of its error."""
    change = int(error > options.high) - int(error < options.low)
    return min(max(updates + change, options.bounds[0]), options.bounds[1])
