"""What methods on the teacher's own trajectories have in common: time grids, DDIM steps, a check."""

import torch
from torch import Tensor

from distill.core.noise import NoiseSchedule, to_flow
from distill.core.score import Prediction, ScoreModel
from distill.one_step.student import Student
from distill.runtime.errors import UserError


def check_times_alone(student: Student, method: str) -> None:
    """Raise `UserError` for a student with boundary scalings or a guidance scale as an input."""
    if student.timestep_scaling is not None or student.guidance is not None:
        raise UserError(
            f"{method} has boundary conditions of its own and one guidance scale: give "
            "distill.student.timestep_scaling=null and distill.student.guidance_embedding=null"
        )


def grid_times(last: int, count: int) -> Tensor:
    """Times (count + 1,) at equal distances from -1, which stands for clean, to `last`."""
    return torch.linspace(-1, last, count + 1).round().long()


def noised_in_flow(
    schedule: NoiseSchedule, latents: Tensor, noise: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t at times t (B,); the same point as z = (1 - s) x0 + s eps, and its time s (B,) as a flow."""
    x_t = schedule.add_noise(latents, noise, t)
    z, s = to_flow(x_t, schedule.alpha(t), schedule.sigma(t))
    return x_t, z, s.flatten()


def ddim_step(model: ScoreModel, prediction: Prediction, target_t: Tensor) -> Tensor:
    """One DDIM step to times (B,); -1 is clean."""
    x_s = model.schedule.add_noise(prediction.x0, prediction.eps, target_t.clamp_min(0))
    return torch.where((target_t < 0)[:, None, None, None], prediction.x0, x_s)


def ddim_target(model: ScoreModel, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x0 for which one DDIM step from x_t at t gives x_s at times s (-1: clean).

    Salimans & Ho 2022, arXiv:2202.00512, eq. 26.
    """
    schedule, clean = model.schedule, (s < 0)[:, None, None, None]
    alpha = torch.where(clean, 1.0, schedule.alpha(s.clamp_min(0)))
    sigma = torch.where(clean, 0.0, schedule.sigma(s.clamp_min(0)))
    ratio = sigma / schedule.sigma(t)
    return (x_s - ratio * x_t) / (alpha - ratio * schedule.alpha(t))
