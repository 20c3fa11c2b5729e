"""Score identity distillation (SiD, arXiv:2404.04057, eq. 23): second order, its gradient runs through
teacher and critic.
"""

from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from distill.core.conditioning import Conditioning
from distill.core.score import Guided, Prediction, guidance_nfe
from distill.objectives.options import CriticOptions
from distill.one_step.adversarial import no_param_grad
from distill.one_step.methods.base import (
    Batch,
    CriticMethod,
    MethodContext,
    MethodOptions,
    MicroBatch,
    Outcome,
    generate,
)
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload_all


@dataclass(frozen=True)
class SiDOptions(MethodOptions):
    """SiD's loss: `guidance` is the CFG scale of teacher and critic (SiD-LSG, arXiv:2406.01561)."""

    alpha: float = 1.0  # 1.2 in SiD without guidance, 1 with it
    guidance: float = 2.0
    low: float = 0.02  # t / T is uniform in [low, high]
    high: float = 0.8
    critic: CriticOptions = field(default_factory=lambda: CriticOptions("copy", learning_rate=6e-4))
    critic_guidance: float = 1.0  # CFG scale under which the critic is trained (SiD-LSG: that of `guidance`)
    caption_dropout: float = 0.0  # fraction of the captions that are empty in the critic's training

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"caption_dropout is {self.caption_dropout}: a fraction in [0, 1] is expected")
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"times from {self.low} to {self.high}: expected 0 <= low < high <= 1")

    def build(self, context: MethodContext) -> "SiD":
        """As of every method."""
        return SiD(context, self)

    @property
    def critic_updates(self) -> int:
        """As of every method."""
        return self.critic.updates

    @property
    def needs_real(self) -> bool:
        """As of every method: it is free of data."""
        return False

    def unguided(self, critic_learning_rate: float, gan_weights: tuple[float, float]) -> "SiDOptions":
        """As of every method."""
        critic = replace(self.critic, learning_rate=critic_learning_rate)
        return replace(self, guidance=1.0, critic_guidance=1.0, critic=critic)


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
        t = self.times(len(generated), generator)
        noise = torch.randn(generated.shape, generator=generator)
        t, noise = upload_all([t, noise], generated.device)
        x_t = student.schedule.add_noise(generated, noise.to(generated.dtype), t)

        denoiser, guidance = self.critic.denoiser, self.options.guidance
        teacher = Guided(self.teacher, batch.uncond, guidance).predict(x_t, t, batch.conditioning)
        with denoiser.adapter_enabled(), no_param_grad(denoiser.network):
            critic = Guided(denoiser, batch.uncond, guidance).predict(x_t, t, batch.conditioning)
        loss = identity_loss(teacher, critic, generated, self.options.alpha)
        return Outcome(loss, generated.detach(), {"sid": loss.detach()})

    @property
    def through_critic(self) -> bool:
        """As of every method."""
        return True

    def critic_loss(self, part: MicroBatch) -> Tensor:
        """As of every method; under guidance the error of the guided eps (SiD-LSG, algorithm 1)."""
        options, batch, clean = self.options, part.batch, part.outcome.generated
        if options.critic_guidance == 1 and options.caption_dropout == 0:
            return super().critic_loss(part)
        assert clean is not None
        generator, schedule = part.generator, self.critic.schedule
        t = torch.randint(schedule.num_train_timesteps, (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        dropped = torch.rand(len(clean), generator=generator) < options.caption_dropout
        rows = torch.where(dropped, 0, torch.arange(len(clean)) + 1)
        t, noise, rows = upload_all([t, noise, rows], clean.device)

        conditioning = Conditioning.cat([batch.uncond, batch.conditioning]).select(rows)
        guided = Guided(self.critic.denoiser, batch.uncond, options.critic_guidance)
        eps = guided.predict(schedule.add_noise(clean, noise, t), t, conditioning).eps
        return functional.mse_loss(eps, noise)

    def cost(self, progress: float) -> float:
        """As of every method: forward and backward through the student, and to the inputs of both models."""
        models = 4 * guidance_nfe(self.options.guidance)
        return 3 + models + self.critic_cost(progress) * guidance_nfe(self.options.critic_guidance)
