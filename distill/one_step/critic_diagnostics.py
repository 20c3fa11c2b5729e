"""How far the critic lags behind the student: the orthogonality of a best predictor's residual.

If the critic answers E[eps | x_t] of what the student makes now, its residual eps - eps_critic is uncorrelated with every function
of x_t. What correlation there is with some probes of x_t is error that it could still learn away (the normal equations).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.score import ScoreModel
from distill.runtime.errors import UserError


@dataclass(frozen=True)
class LagOptions:
    """Measured every `every` cycles (0: never). `adapt`: one more critic update a cycle above `high`, one less below `low`, in `bounds`."""

    every: int = 20
    adapt: bool = False
    low: float = 0.01
    high: float = 0.03
    bounds: tuple[int, int] = (1, 10)

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high or not 1 <= self.bounds[0] <= self.bounds[1]:
            raise UserError("the lag's low must be below its high, and its bounds at least 1, low then high")


@torch.no_grad()
def critic_lag(
    critic: ScoreModel,
    generated: Tensor,
    states: Tensor,
    generator: torch.Generator,
    rivals: Mapping[str, ScoreModel],
) -> dict[str, float]:
    """Correlation of the critic's residual with each probe of x_t, over a batch (B, C, h, w) of what the student makes now.

    The probes: x_t, the critic's own answer, and how each rival (the teacher, say) differs from it. A critic that has caught up scores 0
    within about 1 / sqrt(B C h w).
    """
    t = torch.randint(
        critic.schedule.num_train_timesteps // 50,
        critic.schedule.num_train_timesteps,
        (len(generated),),
        generator=generator,
    ).to(generated.device)
    noise = torch.randn(generated.shape, generator=generator).to(generated)
    x_t = critic.schedule.add_noise(generated, noise, t)
    told = critic.predict(x_t, t, states).eps
    probes = {"x_t": x_t, "itself": told}
    probes |= {name: rival.predict(x_t, t, states).eps - told for name, rival in rivals.items()}
    residual = noise - told
    return {name: _correlation(residual, probe) for name, probe in probes.items()}


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(1), b.double().flatten(1)
    each = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-12)
    return float(each.mean())


def adapted(updates: int, lag: float, options: LagOptions) -> int:
    """The number of critic updates a cycle after a look at the lag."""
    change = int(lag > options.high) - int(lag < options.low)
    return min(max(updates + change, options.bounds[0]), options.bounds[1])
