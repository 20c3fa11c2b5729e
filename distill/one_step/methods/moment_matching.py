"""Inductive moment matching (IMM, Zhou, Ermon, Song 2025, arXiv:2503.07565), by the teacher's ODE or data.

In the variables of flow matching (`mean_flow`), a student maps z_t to z_t - (t - s) U(z_t, s, t) at an
earlier time s. Samples that it brings to s from t, and from a time r just below t, must have one
distribution: their maximum mean discrepancy over small groups is the loss. With one sample a group it would
be a consistency model's.
"""

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from distill.core.score import Guided
from distill.one_step.methods.base import Batch, Method, MethodContext, MethodOptions, Outcome
from distill.one_step.methods.mean_flow import average_velocity
from distill.one_step.methods.trajectories import check_times_alone, noised_in_flow
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload_all


@dataclass(frozen=True)
class MomentMatchingOptions(MethodOptions):
    """The groups, the step from t to r, and the weight of a time (the paper's names in brackets)."""

    # of the teacher's step from t to r; null: by the data instead, as in the paper, without guidance
    guidance: float | None = 2.0
    group: int = 4  # samples whose distributions are compared [M]
    # of sigma / alpha, from t to r (paper: 160 / 2^12)
    decrement: float = 0.05
    from_zero: float = 0.5  # fraction of groups with s = 0, which one step asks for (paper: s is uniform)
    weight_shift: float = 5.0  # of the log signal-to-noise ratio [b]
    weight_power: float = 1.0  # of alpha; 2 for several steps [a]
    max_frequency: float = 0.01  # of the time embedding, radians a timestep, as of continuous_consistency
    features: int = 4  # sinusoids of s as an input

    def __post_init__(self) -> None:
        if self.group < 2 or not 0 <= self.from_zero <= 1:
            raise UserError(
                f"moment matching of groups of {self.group}, {self.from_zero:g} of them from 0: expected "
                "at least 2 samples a group and a fraction in [0, 1]"
            )
        if min(self.decrement, self.max_frequency, self.features) <= 0:
            raise UserError("moment matching needs a positive decrement, max_frequency and features")

    def build(self, context: MethodContext) -> "MomentMatching":
        """As of every method. Raises `UserError` where the student cannot be trained so."""
        check_times_alone(context.student, "moment matching")
        if len(context.example.noise) % self.group:
            raise UserError(
                f"the batch of {len(context.example.noise)} cannot be divided into groups of {self.group}: "
                "change distill.batch or method.group"
            )
        return MomentMatching(context, self)

    @property
    def from_last_level(self) -> bool:
        """As of every method."""
        return True

    def unguided(
        self, critic_learning_rate: float, gan_weights: tuple[float, float]
    ) -> "MomentMatchingOptions":
        """As of every method."""
        return replace(self, guidance=None if self.guidance is None else 1.0)


def earlier_time(t: Tensor, s: Tensor, decrement: float) -> Tensor:
    """r (B,) of flow times t and s (B,): sigma / alpha less by `decrement`, not below s."""
    level = (t / (1 - t) - decrement).clamp_min(0.0)
    return torch.maximum(level / (1 + level), s)


def laplace_kernel(first: Tensor, second: Tensor, scale: Tensor, smallest: float = 1e-8) -> Tensor:
    """exp(-scale |x - y| / D) of all pairs (G, M, M) in groups (G, M, D); scales (G,)."""
    distance = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist").clamp_min(smallest)
    return (-scale[:, None, None] * distance / first.shape[-1]).exp()


def squared_discrepancy(first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    """Squared maximum mean discrepancy (G,) of the samples in groups (G, M, D), by all pairs."""
    kernel = laplace_kernel(first, first, scale) + laplace_kernel(second, second, scale)
    return (kernel - 2 * laplace_kernel(first, second, scale)).mean((1, 2))


def time_weight(t: Tensor, shift: float, power: float) -> Tensor:
    """w (B,) of flow times t in (0, 1): the denoising loss's, by the log signal-to-noise ratio."""
    log_ratio = 2 * torch.log((1 - t) / t)
    velocity = 2 / (t * (1 - t))  # of the ratio's fall
    norm = (1 - t).square() + t.square()
    return 0.5 * torch.sigmoid(shift - log_ratio) * velocity * (1 - t) ** power / norm


@final
class MomentMatching(Method):
    """Samples from t and from r, at s, must have one distribution; those from r are the target."""

    def __init__(self, context: MethodContext, options: MomentMatchingOptions) -> None:
        self.teacher, self.options = context.teacher, options
        context.student.denoiser.limit_time_frequency(options.max_frequency)
        context.student.denoiser.add_interval_start(options.features)

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """The weighted discrepancy, in each group of the batch, which has one t and one s."""
        options, schedule = self.options, student.schedule
        groups = len(batch.real) // options.group
        time, fraction, zero = torch.rand(3, groups, generator=generator)
        fraction = torch.where(zero < options.from_zero, 0.0, fraction)
        t = schedule.sigma_to_t(time / (1 - time)).clamp(1, student.timesteps[0])
        t, fraction = upload_all(
            [t.repeat_interleave(options.group), fraction.repeat_interleave(options.group)], batch.real.device
        )
        x_t, z_t, time = noised_in_flow(schedule, batch.real, batch.noise, t)
        s = fraction * time
        r = earlier_time(time, s, options.decrement)

        with torch.no_grad():
            if options.guidance is None:
                velocity = batch.noise - batch.real
            else:
                guided = Guided(self.teacher, batch.uncond, options.guidance)
                velocity = guided.predict(x_t, t, batch.conditioning).flow
            z_r = z_t - _length(time, r) * velocity
            target = z_r - _length(r, s) * average_velocity(student.denoiser, z_r, s, r, batch.conditioning)
        output = z_t - _length(time, s) * average_velocity(student.denoiser, z_t, s, time, batch.conditioning)

        shape = (groups, options.group, -1)
        first = slice(None, None, options.group)
        scale = 1 / (time - s)[first].clamp_min(1e-6)
        discrepancy = squared_discrepancy(output.reshape(shape), target.reshape(shape), scale)
        weight = time_weight(time[first], options.weight_shift, options.weight_power)
        loss = (weight * discrepancy).mean()
        return Outcome(loss, None, {"discrepancy": loss.detach()})

    def cost(self, progress: float) -> float:
        """As of every method: student forward and backward, once more without gradient, the teacher."""
        guidance = self.options.guidance
        return 4 + (0 if guidance is None else 1 if math.isclose(guidance, 1) else 2)


def _length(end: Tensor, start: Tensor) -> Tensor:
    return (end - start)[:, None, None, None]
