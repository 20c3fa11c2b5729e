"""Mean flow (Geng et al. 2025, arXiv:2505.13447): the average velocity over an interval of the teacher's ODE.

In the variables of flow matching, z = (1 - s) x0 + s eps at time s in [0, 1], the ODE is dz/ds = v, and a
network's flow eps - x0 is taken for U(z, r, s), the average of v from r to s: z_r = z - (s - r) U. So its x0
is where the ODE from s ends at 0, in one step. Shortcut models (Frans et al. 2024, arXiv:2410.12557) learn
the same from the two halves of an interval instead of a derivative.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import clean_and_noise
from distill.core.score import Guided
from distill.core.teacher import INTERVAL_START, Denoiser
from distill.one_step.methods.base import Batch, Method, MethodContext, MethodOptions, Outcome
from distill.one_step.methods.derivatives import value_and_derivative
from distill.one_step.methods.trajectories import check_times_alone, noised_in_flow
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload_all

SHORTEST = 1 / 128  # interval that is halved, as in shortcut models


@dataclass(frozen=True)
class MeanFlowOptions(MethodOptions):
    """The teacher's CFG scale, the times and intervals, and the weight of a sample's loss (section 4)."""

    guidance: float = 2.0
    # what U of an interval must be: by its derivative, or the mean of the two halves' U, as shortcut models
    target: Literal["derivative", "halves"] = "derivative"
    intervals: float = 0.75  # fraction of rows with r < s; the others learn v itself (paper: 0.25)
    from_zero: float = 0.5  # of those, the fraction with r = 0, which one step asks for (paper: 0)
    logit_mean: float = -0.4  # of both times, logit-normal
    logit_std: float = 1.0
    weight_power: float = (
        0.5  # p of the weight 1 / (|error|^2 + c)^p (paper: 1; on the mixture 0.5 learns faster)
    )
    weight_constant: float = 1e-3  # its c
    max_frequency: float = 0.01  # of the time embedding, radians a timestep, as of continuous_consistency
    features: int = 4  # sinusoids of r as an input

    def __post_init__(self) -> None:
        if not 0 < self.intervals <= 1 or not 0 <= self.from_zero <= 1:
            raise UserError(
                f"mean flow needs intervals in (0, 1] and from_zero in [0, 1], not {self.intervals:g} and "
                f"{self.from_zero:g}"
            )
        positive = (self.logit_std, self.weight_constant, self.max_frequency, self.features)
        if min(positive) <= 0 or self.weight_power < 0:
            raise UserError(
                "mean flow needs a positive logit_std, weight_constant, max_frequency and features, "
                "and a weight_power of 0 or more"
            )

    def build(self, context: MethodContext) -> "MeanFlow":
        """As of every method. Raises `UserError` where the student cannot be trained so."""
        check_times_alone(context.student, "mean flow")
        return MeanFlow(context, self)

    @property
    def from_last_level(self) -> bool:
        """As of every method."""
        return True

    def unguided(self, critic_learning_rate: float, gan_weights: tuple[float, float]) -> "MeanFlowOptions":
        """As of every method."""
        return replace(self, guidance=1.0)


def average_velocity(
    denoiser: Denoiser, z: Tensor, r: Tensor, s: Tensor, conditioning: Conditioning
) -> Tensor:
    """U (B, C, h, w) of a denoiser for z at times s (B,) in (0, 1], from times r (B,) on."""
    s = s[:, None, None, None]
    norm = ((1 - s).square() + s.square()).sqrt()
    alpha, sigma = (1 - s) / norm, s / norm
    t = denoiser.schedule.angle_to_t(torch.atan2(sigma, alpha).flatten())
    x_t = z / norm
    output = denoiser.output(x_t, t, conditioning.with_extras(**{INTERVAL_START: r}))
    x0, eps = clean_and_noise(output, x_t, alpha, sigma, denoiser.prediction_type)
    return eps - x0


def by_derivative(
    denoiser: Denoiser, z: Tensor, r: Tensor, s: Tensor, v: Tensor, conditioning: Conditioning
) -> Tensor:
    """v - (s - r) dU/ds (B, C, h, w) of a denoiser's U where z (B, C, h, w) moves along v."""

    def average(z: Tensor, s: Tensor) -> Tensor:
        return average_velocity(denoiser, z, r, s, conditioning)

    _, derivative = value_and_derivative(denoiser, average, (z, s), (v, torch.ones_like(s)))
    return v - (s - r)[:, None, None, None] * derivative


def mean_of_halves(
    denoiser: Denoiser, z: Tensor, r: Tensor, s: Tensor, v: Tensor, conditioning: Conditioning
) -> Tensor:
    """The mean (B, C, h, w) of a denoiser's U over the halves of intervals; v where r = s."""
    middle = (r + s) / 2
    first = average_velocity(denoiser, z, middle, s, conditioning)
    z_middle = z - (s - middle)[:, None, None, None] * first
    second = average_velocity(denoiser, z_middle, r, middle, conditioning)
    return torch.where((r == s)[:, None, None, None], v, (first + second) / 2)


@final
class MeanFlow(Method):
    """The derivative of (s - r) U along the ODE is v, so that U = v - (s - r) dU/ds (eq. 6).

    By halves, U from r to s is the mean of those from r to the middle and from there to s (shortcut models,
    eq. 4); intervals shorter than `SHORTEST` learn v there.
    """

    def __init__(self, context: MethodContext, options: MeanFlowOptions) -> None:
        self.teacher, self.options = context.teacher, options
        context.student.denoiser.limit_time_frequency(options.max_frequency)
        context.student.denoiser.add_interval_start(options.features)

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """Squared error to the target, by the guided teacher's v; each sample weighted (eq. 22)."""
        options, schedule, count = self.options, student.schedule, len(batch.real)
        normal = torch.randn(2, count, generator=generator)
        times = torch.sigmoid(options.logit_mean + options.logit_std * normal)
        level, start = times.amax(0), times.amin(0)
        t = schedule.sigma_to_t(level / (1 - level)).clamp_max(student.timesteps[0])
        fraction = torch.rand(count, generator=generator)
        point, zero = fraction >= options.intervals, fraction < options.intervals * options.from_zero
        t, start, point, zero = upload_all([t, start, point, zero], batch.real.device)
        x_t, z, s = noised_in_flow(schedule, batch.real, batch.noise, t)
        r = torch.where(zero, 0.0, torch.where(point, s, torch.minimum(start, s)))

        with torch.no_grad():
            direction = Guided(self.teacher, batch.uncond, options.guidance)
            v = direction.predict(x_t, t, batch.conditioning).flow
            if options.target == "halves":
                r = torch.where(s - r < SHORTEST, s, r)
                target = mean_of_halves(student.denoiser, z, r, s, v, batch.conditioning)
            else:
                target = by_derivative(student.denoiser, z, r, s, v, batch.conditioning)
        error = average_velocity(student.denoiser, z, r, s, batch.conditioning) - target
        squared = error.square().sum((1, 2, 3))
        weight = (squared.detach() + options.weight_constant) ** -options.weight_power
        return Outcome((weight * squared).mean(), None, {"mean_flow": squared.detach().mean()})

    def cost(self, progress: float) -> float:
        """As of every method: student forward and backward, a Jacobian-vector product or two halves (2), the
        teacher.
        """
        return 5 + (1 if math.isclose(self.options.guidance, 1) else 2)
