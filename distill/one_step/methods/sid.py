"""Score identity distillation (SiD, arXiv:2404.04057, eq. 23): second order, its gradient runs through teacher and critic."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.score import Prediction
from distill.runtime.errors import UserError


@dataclass(frozen=True)
class SecondOrderOptions:
    """`alpha` of the identity (1.2 in SiD, 1 with guidance); `guidance` of teacher and critic (SiD-LSG, arXiv:2406.01561); t / T within."""

    alpha: float = 1.2
    guidance: float = 1.0
    low: float = 0.02
    high: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"times from {self.low} to {self.high}: expected 0 <= low < high <= 1")


def identity_loss(teacher: Prediction, critic: Prediction, generated: Tensor, alpha: float) -> Tensor:
    """Mean over samples of (x_r - x_c) . ((x_r - z) - alpha (x_r - x_c)) / mean|z - x_r| (stopped), with x_r, x_c the two answers for x0.

    In SiD's terms (1 - alpha) |f - f_psi|^2 + (f - f_psi) . (f_psi - x_g): written so that nothing cancels by rounding.
    """
    apart = teacher.x0 - critic.x0
    scale = (generated - teacher.x0).detach().abs().mean((1, 2, 3)).clamp_min(1e-6)
    return ((apart * ((teacher.x0 - generated) - alpha * apart)).sum((1, 2, 3)) / scale).mean()


def times(options: SecondOrderOptions, count: int, steps: int, generator: torch.Generator) -> Tensor:
    """Integer times (count,), uniform within the options' bounds."""
    share = options.low + (options.high - options.low) * torch.rand(count, generator=generator)
    return (share * (steps - 1)).round().long()
