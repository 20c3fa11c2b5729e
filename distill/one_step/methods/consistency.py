"""Latent consistency distillation (LCM, arXiv:2310.04378), on the teacher's own trajectories from real
latents.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from distill.core.score import Guided
from distill.one_step.methods.base import Batch, Method, MethodContext, MethodOptions, Outcome
from distill.one_step.methods.trajectories import ddim_step, grid_times
from distill.one_step.student import Student
from distill.runtime.checkpoint import Stateful
from distill.runtime.errors import UserError


@dataclass(frozen=True)
class ConsistencyOptions(MethodOptions):
    """The time grid, the teacher's CFG scale, the target network's EMA and the constant of the
    pseudo-Huber distance.
    """

    grid: int = 25
    guidance: float = 2.0
    ema: float = 0.95
    huber: float = 0.03

    def __post_init__(self) -> None:
        if self.grid < 2 or not 0 <= self.ema < 1 or self.huber <= 0:
            raise UserError(
                "consistency needs a grid of at least 2 times, ema in [0, 1) and a positive huber"
            )

    def build(self, context: MethodContext) -> "Consistency":
        """As of every method."""
        return Consistency(context, self)

    def unguided(self, critic_learning_rate: float, gan_weights: tuple[float, float]) -> "ConsistencyOptions":
        """As of every method."""
        return replace(self, guidance=1.0)


@final
class Consistency(Method):
    """The student's predictions at two neighbouring points of the guided teacher's trajectory must agree."""

    def __init__(self, context: MethodContext, options: ConsistencyOptions) -> None:
        self.teacher, self.options = context.teacher, options
        self.target = copy.deepcopy(context.student).requires_grad_(False)

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """Pseudo-Huber distance (arXiv:2310.14189, eq. 8) to the target's x0 one step of the teacher's ODE
        on.
        """
        grid = grid_times(student.timesteps[0], self.options.grid)
        index = torch.randint(1, len(grid), (len(batch.real),), generator=generator)
        t, s = grid[index].to(batch.real.device), grid[index - 1].to(batch.real.device)
        x_t = student.schedule.add_noise(batch.real, batch.noise, t)

        with torch.no_grad():
            _update_ema(self.target, student, self.options.ema)
            guided = Guided(self.teacher, batch.uncond, self.options.guidance)
            x_s = ddim_step(guided, guided.predict(x_t, t, batch.conditioning), s)
            x0 = self.target.predict(x_s, s.clamp_min(0), batch.conditioning).x0
            target = torch.where((s < 0)[:, None, None, None], x_s, x0)

        error = student.predict(x_t, t, batch.conditioning).x0 - target
        c = self.options.huber * math.sqrt(target[0].numel())
        loss = ((error.square().sum((1, 2, 3)) + c**2).sqrt() - c).mean()
        return Outcome(loss, None, {"consistency": loss.detach()})

    def state(self) -> dict[str, Stateful]:
        """The target network."""
        return {"target": self.target}

    def cost(self, progress: float) -> float:
        """As of every method: student forward and backward, target once, teacher once or guided."""
        return 4 + (1 if self.options.guidance == 1 else 2)


@torch.no_grad()
def _update_ema(target: Student, student: Student, decay: float) -> None:
    parameters: list[Tensor] = [parameter.detach() for parameter in student.parameters()]
    torch._foreach_lerp_(list(target.parameters()), parameters, 1 - decay)
