"""DDIM inversion: the reverse ODE of sampling, from a clean latent to a noisy one (Song et al. 2021, arXiv:2010.02502, section 4.3)."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.score import Guided, Prediction, ScoreModel


@dataclass(frozen=True)
class InversionTrajectory:
    """Where a path ends, x_t; where it was before its last step, x_s (B, C, H, W) at times s (B,), and what was predicted there."""

    x_t: Tensor
    x_s: Tensor
    s: Tensor
    prediction: Prediction


def path_times(t: Tensor, steps: int, gap: int) -> Tensor:
    """Times (steps + 1 (+ 1), B) from 0 to t in equal steps; with a gap, to t - gap in them and to t in one more."""
    last = (t - gap).clamp(min=0)
    share = torch.arange(steps + 1, device=t.device)[:, None] / steps
    times = (share * last).round().long()
    return torch.cat([times, t[None]]) if gap else times


@torch.no_grad()
def invert(
    model: ScoreModel,
    latents: Tensor,
    t: Tensor,
    states: dict[str, Tensor],
    guidance: float,
    steps: int,
    gap: int,
) -> InversionTrajectory:
    """The path from latents (B, C, H, W) to times t (B,); `states` holds the conditional and/or unconditional ones (B, ...)."""
    if guidance == 0:
        guided, bound = model, states["unconditional"]
    elif guidance == 1:
        guided, bound = model, states["conditional"]
    else:
        guided, bound = Guided(model, states["unconditional"], guidance), states["conditional"]
    times = path_times(t, steps, gap)
    x_s = x_t = latents
    prediction = None
    for now, following in itertools.pairwise(times):
        x_s, prediction = x_t, guided.predict(x_t, now, bound)
        x_t = model.schedule.add_noise(prediction.x0, prediction.eps, following)
    assert prediction is not None  # there is at least one step
    return InversionTrajectory(x_t, x_s, times[-2], prediction)
