"""Consistency distillation in continuous time (sCM, Lu & Song 2024, arXiv:2410.11081).

With unit variance, the angle u of a noise level, alpha = cos u and sigma = sin u, is the time of TrigFlow
(section 3.1, sigma_d = 1): x_u = cos(u) x0 + sin(u) eps moves along the ODE by dx/du = v. A denoiser's v is
its F, and f(x, u) = cos(u) x - sin(u) F(x, u) its x0. No discretisation: the tangent df/du of the student is
a Jacobian-vector product.
"""

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import clean_and_noise
from distill.core.score import Guided
from distill.core.teacher import Denoiser
from distill.one_step.methods.base import Batch, Method, MethodContext, MethodOptions, Outcome
from distill.one_step.methods.derivatives import value_and_derivative
from distill.one_step.methods.trajectories import check_times_alone
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload


@dataclass(frozen=True)
class ContinuousConsistencyOptions(MethodOptions):
    """The teacher's CFG scale, the noise levels, and what makes the tangent stable (section 4).

    Derivatives by u amplify the high frequencies of a time embedding, which a teacher that was trained at
    integer times has never been asked about: on the mixture nothing is learnt with them. They are removed,
    and in the first part of the run, `adapt`, the student learns to do without them from the teacher's v.
    """

    guidance: float = 2.0
    max_frequency: float = 0.01  # of the time embedding, radians a timestep (SD's: up to 1)
    adapt: float = 0.1  # fraction of the run
    log_mean: float = -0.8  # of log(sigma / alpha), normal
    log_std: float = 1.6
    warmup: float = 0.2  # fraction of the run, after `adapt`, in which the tangent's second term grows
    tangent_constant: float = 0.1  # c of tangent normalisation g / (|g| + c)

    def __post_init__(self) -> None:
        if min(self.log_std, self.tangent_constant, self.max_frequency) <= 0:
            raise UserError(
                "continuous consistency needs a positive log_std, tangent_constant and max_frequency"
            )
        if min(self.adapt, self.warmup) < 0 or self.adapt + self.warmup > 1:
            raise UserError(
                f"adapt={self.adapt:g} and warmup={self.warmup:g}: "
                "fractions that sum to at most 1 are expected"
            )

    def build(self, context: MethodContext) -> "ContinuousConsistency":
        """As of every method. Raises `UserError` where the student cannot be trained so."""
        check_times_alone(context.student, "continuous consistency")
        return ContinuousConsistency(context, self)

    @property
    def from_last_level(self) -> bool:
        """As of every method."""
        return True

    def unguided(
        self, critic_learning_rate: float, gan_weights: tuple[float, float]
    ) -> "ContinuousConsistencyOptions":
        """As of every method."""
        return replace(self, guidance=1.0)


def velocity(denoiser: Denoiser, x: Tensor, angle: Tensor, conditioning: Conditioning) -> Tensor:
    """A denoiser's v (B, C, h, w) for x at angles (B,) in radians, between the times of its schedule too."""
    output = denoiser.output(x, denoiser.schedule.angle_to_t(angle), conditioning)
    alpha, sigma = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
    x0, eps = clean_and_noise(output, x, alpha, sigma, denoiser.prediction_type)
    return alpha * eps - sigma * x0


def velocity_and_derivative(
    denoiser: Denoiser, x: Tensor, angle: Tensor, conditioning: Conditioning, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """v and dv/du (B, C, h, w), where x moves by `direction` = dx/du as the angle grows."""

    def function(x: Tensor, angle: Tensor) -> Tensor:
        return velocity(denoiser, x, angle, conditioning)

    return value_and_derivative(denoiser, function, (x, angle), (direction, torch.ones_like(angle)))


@final
class ContinuousConsistency(Method):
    """The student's x0 is constant along the guided teacher's ODE: its derivative there becomes zero."""

    def __init__(self, context: MethodContext, options: ContinuousConsistencyOptions) -> None:
        self.teacher, self.options = context.teacher, options
        context.student.denoiser.limit_time_frequency(options.max_frequency)

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """Mean squared distance of F to its own value plus the normalised tangent (algorithm 1); before, to
        the teacher's.

        Without the learned weights of its noise levels, which unit tangents need least.
        """
        options, schedule = self.options, student.schedule
        guided = Guided(self.teacher, batch.uncond, options.guidance)
        if progress < options.adapt:
            t = torch.randint(student.timesteps[0] + 1, (len(batch.real),), generator=generator)
            t = upload(t, batch.real.device)
            x_t = schedule.add_noise(batch.real, batch.noise, t)
            with torch.no_grad():
                target = guided.predict(x_t, t, batch.conditioning).v
            loss = (student.predict(x_t, t, batch.conditioning).v - target).square().mean()
            return Outcome(loss, None, {"adapt": loss.detach()})

        levels = options.log_mean + options.log_std * torch.randn(len(batch.real), generator=generator)
        t = schedule.sigma_to_t(upload(levels.exp(), batch.real.device)).clamp_max(student.timesteps[0])
        x_t = schedule.add_noise(batch.real, batch.noise, t)
        with torch.no_grad():
            direction = guided.predict(x_t, t, batch.conditioning).v
            own, derivative = velocity_and_derivative(
                student.denoiser, x_t, schedule.angle(t), batch.conditioning, direction
            )
            ramp = 1.0 if options.warmup == 0 else min((progress - options.adapt) / options.warmup, 1.0)
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            tangent = self.tangent(x_t, own, direction, derivative, alpha, sigma, ramp)
            norm = tangent.square().mean((1, 2, 3), keepdim=True).sqrt()
            target = own + tangent / (norm + options.tangent_constant)
        loss = (student.predict(x_t, t, batch.conditioning).v - target).square().mean()
        return Outcome(loss, None, {"consistency": loss.detach(), "tangent": norm.mean()})

    @staticmethod
    def tangent(
        x: Tensor,
        own: Tensor,
        direction: Tensor,
        derivative: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        ramp: float = 1.0,
    ) -> Tensor:
        """cos(u) df/du of f = cos(u) x - sin(u) F (eq. 8), its second term times `ramp` (tangent warm-up)."""
        return -alpha.square() * (own - direction) - ramp * alpha * sigma * (x + derivative)

    def cost(self, progress: float) -> float:
        """As of every method: student forward and backward, a Jacobian-vector product (2), the teacher."""
        product = 0 if progress < self.options.adapt else 2
        return 3 + product + (1 if math.isclose(self.options.guidance, 1) else 2)
