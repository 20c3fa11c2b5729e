"""Progressive distillation (Salimans & Ho 2022, arXiv:2202.00512), on the teacher's own trajectories from
real latents.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import final

import torch

from distill.core.conditioning import Conditioning
from distill.core.score import Guided, Prediction, ScoreModel
from distill.one_step.methods.base import Batch, Method, MethodContext, MethodOptions, Outcome
from distill.one_step.methods.trajectories import ddim_step, ddim_target, grid_times
from distill.one_step.student import Student
from distill.runtime.checkpoint import Stateful, TensorState
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload_all


@dataclass(frozen=True)
class ProgressiveOptions(MethodOptions):
    """From `start` steps, halved in equal fractions of the run; the teacher's CFG scale in the first
    stage.
    """

    start: int = 32
    guidance: float = 2.0

    def __post_init__(self) -> None:
        if self.start < 2 or self.start & (self.start - 1):
            raise UserError(f"progressive.start is {self.start}: a power of two of at least 2 is expected")

    def build(self, context: MethodContext) -> "Progressive":
        """As of every method."""
        return Progressive(context, self)

    @property
    def from_last_level(self) -> bool:
        """As of every method."""
        return True

    def unguided(self, critic_learning_rate: float, gan_weights: tuple[float, float]) -> "ProgressiveOptions":
        """As of every method."""
        return replace(self, guidance=1.0)


@final
class Progressive(Method):
    """The student learns to do in one step what its teacher does in two; then it becomes the teacher."""

    def __init__(self, context: MethodContext, options: ProgressiveOptions) -> None:
        self.teacher, self.options = context.teacher, options
        self.stages = int(math.log2(options.start))
        self.teacher_copy = copy.deepcopy(context.student).requires_grad_(False)  # the last stage's student
        self.stage = torch.zeros((), dtype=torch.long)

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """Squared error of x0, weighted by max(SNR, 1) (eq. 9), to the target of two of the teacher's
        steps (eq. 26).
        """
        stage = min(int(progress * self.stages), self.stages - 1)
        if stage != int(self.stage):
            self.teacher_copy.load_state_dict(student.state_dict())
            self.stage.fill_(stage)
        steps = self.options.start >> (stage + 1)  # the student's at this stage
        grid = grid_times(student.timesteps[0], 2 * steps)
        index = 2 * torch.randint(1, steps + 1, (len(batch.real),), generator=generator)
        t, middle, end = upload_all([grid[index - k] for k in range(3)], batch.real.device)
        x_t = student.schedule.add_noise(batch.real, batch.noise, t)

        with torch.no_grad():
            model: ScoreModel = StudentDenoiser(self.teacher_copy)
            if stage == 0:
                model = Guided(self.teacher, batch.uncond, self.options.guidance)
            x_middle = ddim_step(model, model.predict(x_t, t, batch.conditioning), middle)
            x_end = ddim_step(model, model.predict(x_middle, middle, batch.conditioning), end)
            target = ddim_target(model, x_t, x_end, t, end)

        alpha, sigma = student.schedule.alpha(t), student.schedule.sigma(t)
        weight = (alpha / sigma).square().clamp_min(1.0)
        error = (student.predict(x_t, t, batch.conditioning).x0 - target).square() * weight
        loss = error.sum((1, 2, 3)).mean() / 2
        metrics = {"progressive": loss.detach(), "steps": torch.full_like(loss.detach(), steps)}
        return Outcome(loss, None, metrics)

    @property
    def copies(self) -> list[Student]:
        """The stage's teacher."""
        return [self.teacher_copy]

    def state(self) -> dict[str, Stateful]:
        """The stage's teacher, and which stage it is."""
        return {"teacher_copy": self.teacher_copy, "stage": TensorState(self.stage)}

    def cost(self, progress: float) -> float:
        """As of every method: student forward and backward, two steps of its teacher, guided in the first
        stage.
        """
        return 3 + 2 * (2 if progress * self.stages < 1 and self.options.guidance != 1 else 1)


@final
class StudentDenoiser(ScoreModel):
    """A student as a score model."""

    def __init__(self, student: Student) -> None:
        self.student, self.schedule = student, student.schedule

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> Prediction:
        """As of every score model."""
        return self.student.predict(x_t, t, conditioning)
