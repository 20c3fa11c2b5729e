"""Score identity distillation (SiD, arXiv:2404.04057, eq. 23): second order, its gradient runs through
teacher and critic.
"""

from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from distill.core.score import Guided, Prediction
from distill.objectives.options import CriticOptions
from distill.one_step.adversarial import no_param_grad
from distill.one_step.methods.base import Batch, CriticMethod, MethodContext, MethodOptions, Outcome, generate
from distill.one_step.student import Student
from distill.runtime.errors import UserError


@dataclass(frozen=True)
class SiDOptions(MethodOptions):
    """SiD's loss: `guidance` is the CFG scale of teacher and critic (SiD-LSG, arXiv:2406.01561)."""

    alpha: float = 1.0  # 1.2 in SiD without guidance, 1 with it
    guidance: float = 2.0
    low: float = 0.02  # t / T is uniform in [low, high]
    high: float = 0.8
    critic: CriticOptions = field(default_factory=lambda: CriticOptions("copy", learning_rate=6e-4))

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"times from {self.low} to {self.high}: expected 0 <= low < high <= 1")

    def build(self, context: MethodContext) -> "SiD":
        """As of every method."""
        return SiD(context, self)

    @property
    def critic_updates(self) -> int:
        """As of every method."""
        return self.critic.updates

    def unguided(self, critic_learning_rate: float, gan_weights: tuple[float, float]) -> "SiDOptions":
        """As of every method."""
        return replace(self, guidance=1.0, critic=replace(self.critic, learning_rate=critic_learning_rate))


def identity_loss(teacher: Prediction, critic: Prediction, generated: Tensor, alpha: float) -> Tensor:
    """Mean over samples of (x_r - x_c) . ((x_r - z) - alpha (x_r - x_c)) / mean|z - x_r|, the divisor without
    gradient.

    x_r and x_c are the teacher's and the critic's x0. In SiD's terms (1 - alpha) |f - f_psi|^2 +
    (f - f_psi) . (f_psi - x_g), written so that nothing cancels by rounding.
    """
    difference = teacher.x0 - critic.x0
    scale = (generated - teacher.x0).detach().abs().mean((1, 2, 3)).clamp_min(1e-6)
    return ((difference * ((teacher.x0 - generated) - alpha * difference)).sum((1, 2, 3)) / scale).mean()


@final
class SiD(CriticMethod):
    """The second-order loss, whose gradient runs through teacher and critic to the student."""

    def __init__(self, context: MethodContext, options: SiDOptions) -> None:
        super().__init__(context, options.critic, None)
        self.options = options

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        """Integer times (count,), uniform between the options' bounds."""
        options, steps = self.options, self.teacher.schedule.num_train_timesteps
        fraction = options.low + (options.high - options.low) * torch.rand(count, generator=generator)
        return (fraction * (steps - 1)).round().long()

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """As of every method."""
        generated = generate(student, batch, generator)
        t = self.times(len(generated), generator).to(generated.device)
        noise = torch.randn(generated.shape, generator=generator).to(generated)
        x_t = student.schedule.add_noise(generated, noise, t)

        denoiser = self.critic.denoiser
        with denoiser.adapter_enabled(), no_param_grad(denoiser.network):
            teacher, critic = (
                Guided(model, batch.uncond, self.options.guidance).predict(x_t, t, batch.conditioning)
                for model in (self.teacher, denoiser)
            )
            loss = identity_loss(teacher, critic, generated, self.options.alpha)
        return Outcome(loss, generated.detach(), {"sid": loss.detach()})

    def cost(self, progress: float) -> float:
        """As of every method: forward and backward through the student, and to the inputs of both models."""
        return 3 + 4 * (1 if self.options.guidance == 1 else 2) + self.critic_cost(progress)
