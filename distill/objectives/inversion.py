"""DDIM inversion: the reverse ODE of sampling, from clean to noisy latents (arXiv:2010.02502, section
4.3).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.score import Guided, Prediction, ScoreModel


@dataclass(frozen=True)
class InversionTrajectory:
    """The end point x_t; the point before the last step, x_s (B, C, H, W) at times s (B,), and the prediction
    there.
    """

    x_t: Tensor
    x_s: Tensor
    s: Tensor
    prediction: Prediction


def inversion_times(t: Tensor, steps: int, gap: int) -> Tensor:
    """Times (steps + 1, B) from 0 to t in equal steps; with a gap, to t - gap in them and to t in one
    more.
    """
    last = (t - gap).clamp(min=0)
    fractions = torch.arange(steps + 1, device=t.device)[:, None] / steps
    times = (fractions * last).round().long()
    return torch.cat([times, t[None]]) if gap else times


@torch.no_grad()
def invert(
    model: ScoreModel,
    latents: Tensor,
    t: Tensor,
    prompts: Mapping[str, Conditioning],
    guidance: float,
    steps: int,
    gap: int,
) -> InversionTrajectory:
    """The trajectory from latents (B, C, H, W) to times t (B,).

    `prompts` holds the `conditional` and/or `unconditional` conditioning; guidance 0 uses the latter alone,
    1 the former alone.
    """
    if guidance == 0:
        guided, conditioning = model, prompts["unconditional"]
    elif guidance == 1:
        guided, conditioning = model, prompts["conditional"]
    else:
        guided, conditioning = Guided(model, prompts["unconditional"], guidance), prompts["conditional"]

    x_s = x_t = latents
    prediction = None
    times = inversion_times(t, steps, gap)
    for now, following in itertools.pairwise(times):
        x_s, prediction = x_t, guided.predict(x_t, now, conditioning)
        x_t = model.schedule.add_noise(prediction.x0, prediction.eps, following)
    assert prediction is not None  # there is at least one step
    return InversionTrajectory(x_t, x_s, times[-2], prediction)
