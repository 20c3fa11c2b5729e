"""Latent consistency distillation (LCM, arXiv:2310.04378), on the teacher's own trajectories from real
latents; with a second stage at high noise levels alone (TCM, arXiv:2410.14895).
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.score import Guided
from distill.core.teacher import GUIDANCE
from distill.one_step.methods.base import Batch, Method, MethodContext, MethodOptions, MicroBatch, Outcome
from distill.one_step.methods.trajectories import ddim_step, grid_times
from distill.one_step.student import Student
from distill.runtime.checkpoint import Stateful, TensorState
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload, upload_all


@dataclass(frozen=True)
class TruncationOptions:
    """Truncated consistency (TCM, Lee et al. 2024, arXiv:2410.14895).

    From a fraction `start` of the run on, a second stage: times at and above a noise level alone. Below it
    the student of the first stage is the target, so that the truncated one cannot collapse (its boundary
    condition).
    """

    start: float = 0.5
    level: float = 1.0  # sigma / alpha of the dividing time t'

    def __post_init__(self) -> None:
        if not 0 < self.start < 1 or self.level <= 0:
            raise UserError(
                f"a truncation from {self.start:g} of the run at level {self.level:g}: "
                "a fraction in (0, 1) and a positive level are expected"
            )


@dataclass(frozen=True)
class ConsistencyOptions(MethodOptions):
    """The time grid, the teacher's CFG scale, the target network's EMA and the constant of the
    pseudo-Huber distance.
    """

    grid: int = 25  # times at equal distances, one of the teacher's steps apart (LCM: 50, which skips k = 20)
    guidance: float = 2.0
    # of a scale for each sample, uniform, in place of `guidance`: needs distill.student.guidance_embedding
    # (LCM's paper: [3, 15], which it writes w + 1)
    guidance_range: tuple[float, float] | None = None
    ema: float = 0.95
    huber: float = 0.03
    # the distance of each element alone, of whose mean `huber` is the constant (LCM: 0.001); else of a whole
    # sample, whose constant grows with the root of its size
    elementwise: bool = False
    truncation: TruncationOptions | None = None  # a second stage, as of TCM

    def __post_init__(self) -> None:
        if self.grid < 2 or not 0 <= self.ema < 1 or self.huber <= 0:
            raise UserError(
                "consistency needs a grid of at least 2 times, ema in [0, 1) and a positive huber"
            )
        if self.guidance_range is not None and not 1 <= self.guidance_range[0] < self.guidance_range[1]:
            raise UserError(f"guidance_range is {self.guidance_range}: expected two rising scales from 1 on")

    def build(self, context: MethodContext) -> "Consistency":
        """As of every method. Raises `UserError` where the student cannot be trained so."""
        student = context.student
        if self.guidance_range is not None and student.guidance is None:
            raise UserError(
                "method.guidance_range needs a student that takes the scale as an input: "
                "give distill.student.guidance_embedding={}"
            )
        if student.grid not in (None, self.grid):
            raise UserError(
                f"distill.student.grid is {student.grid} and method.grid {self.grid}: "
                "a student samples at the times it was trained at, give the same"
            )
        return Consistency(context, self)

    @property
    def from_last_level(self) -> bool:
        """As of every method."""
        return True

    def unguided(self, critic_learning_rate: float, gan_weights: tuple[float, float]) -> "ConsistencyOptions":
        """As of every method."""
        return replace(self, guidance=1.0, guidance_range=None)


@final
class Consistency(Method):
    """The student's predictions at two neighbouring points of the guided teacher's trajectory must agree."""

    def __init__(self, context: MethodContext, options: ConsistencyOptions) -> None:
        self.teacher, self.student, self.options = context.teacher, context.student, options
        self.target = copy.deepcopy(context.student).requires_grad_(False)
        self.first_stage: Student | None = None  # its student, which the second one's boundary is
        self.stage = torch.zeros((), dtype=torch.long)
        if options.truncation is not None:
            self.first_stage = copy.deepcopy(self.target)

    def _dividing_time(self, progress: float) -> int | None:
        """t' in the second stage, at whose beginning the student becomes the boundary; None in the first."""
        truncation = self.options.truncation
        if truncation is None or progress < truncation.start:
            return None
        if not int(self.stage):
            assert self.first_stage is not None
            self.first_stage.load_state_dict(self.student.state_dict())
            self.stage.fill_(1)
        return int(self.student.schedule.sigma_to_t(torch.tensor([truncation.level])))

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """Pseudo-Huber distance (arXiv:2310.14189, eq. 8) to the target's x0 one step of the teacher's ODE
        on.
        """
        grid = grid_times(student.timesteps[0], self.options.grid)
        dividing = self._dividing_time(progress)
        first = 1 if dividing is None else int((grid < dividing).sum())
        index = torch.randint(first, len(grid), (len(batch.real),), generator=generator)
        t, s = upload_all([grid[index], grid[index - 1]], batch.real.device)
        x_t = student.schedule.add_noise(batch.real, batch.noise, t)
        scale, conditioning = self._guidance(batch, generator)

        with torch.no_grad():
            guided = Guided(self.teacher, batch.uncond, scale)
            x_s = ddim_step(guided, guided.predict(x_t, t, batch.conditioning), s)
            x0 = self.target.predict(x_s, s.clamp_min(0), conditioning).x0
            if dividing is not None and self.first_stage is not None:
                boundary = self.first_stage.predict(x_s, s.clamp_min(0), conditioning).x0
                x0 = torch.where((s < dividing)[:, None, None, None], boundary, x0)
            target = torch.where((s < 0)[:, None, None, None], x_s, x0)

        loss = self._distance(student.predict(x_t, t, conditioning).x0 - target)
        return Outcome(loss, None, {"consistency": loss.detach()})

    def _guidance(self, batch: Batch, generator: torch.Generator) -> tuple[float | Tensor, Conditioning]:
        """The teacher's scale, or one a sample (B,), and the student's conditioning, which holds it."""
        if self.options.guidance_range is None:
            return self.options.guidance, batch.conditioning
        low, high = self.options.guidance_range
        scales = low + (high - low) * torch.rand(len(batch.real), generator=generator)
        scales = upload(scales, batch.real.device)
        return scales, batch.conditioning.with_extras(**{GUIDANCE: scales})

    def _distance(self, error: Tensor) -> Tensor:
        """Mean pseudo-Huber distance of errors (B, C, h, w)."""
        huber = self.options.huber
        if self.options.elementwise:
            return ((error.square() + huber**2).sqrt() - huber).mean()
        c = huber * math.sqrt(error[0].numel())
        return ((error.square().sum((1, 2, 3)) + c**2).sqrt() - c).mean()

    def update_critic(
        self, micro_batches: Sequence[MicroBatch], progress: float, updates: int | None = None
    ) -> dict[str, Tensor]:
        """The target network follows the student, once a cycle (LCM, algorithm 1)."""
        _update_ema(self.target, self.student, self.options.ema)
        return {}

    @property
    def copies(self) -> list[Student]:
        """The target network, and the first stage's student."""
        return [self.target] if self.first_stage is None else [self.target, self.first_stage]

    def state(self) -> dict[str, Stateful]:
        """The target network; the first stage's student, and which stage it is."""
        if self.first_stage is None:
            return {"target": self.target}
        return {"target": self.target, "first_stage": self.first_stage, "stage": TensorState(self.stage)}

    def cost(self, progress: float) -> float:
        """As of every method: student forward and backward, target once, teacher once or guided; in a second
        stage the first one's student.
        """
        guided = self.options.guidance_range is not None or self.options.guidance != 1
        truncation = self.options.truncation
        second = truncation is not None and progress >= truncation.start
        return 4 + (2 if guided else 1) + (1 if second else 0)


@torch.no_grad()
def _update_ema(target: Student, student: Student, decay: float) -> None:
    parameters: list[Tensor] = [parameter.detach() for parameter in student.parameters()]
    torch._foreach_lerp_(list(target.parameters()), parameters, 1 - decay)
