"""Peers that learn the teacher's own trajectories from real latents: consistency distillation, progressive distillation."""

import copy
import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from distill.core.score import Guided, Prediction, ScoreModel
from distill.one_step.methods.matching import Batch, Method, Outcome
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.teacher.latent import Distillable


@dataclass(frozen=True)
class ConsistencyOptions:
    """Latent consistency distillation (LCM, arXiv:2310.04378): `grid` times, the teacher's guidance, the target's average, Huber's c."""

    grid: int = 25
    guidance: float = 3.0
    ema: float = 0.95
    huber: float = 0.03

    def __post_init__(self) -> None:
        if self.grid < 2 or not 0 <= self.ema < 1 or self.huber <= 0:
            raise UserError(
                "a consistency grid needs 2 times at least, its ema a share in [0, 1), and huber must be positive"
            )


@dataclass(frozen=True)
class ProgressiveOptions:
    """Progressive distillation (Salimans & Ho 2022, arXiv:2202.00512): from `start` steps, halved in equal shares of the run."""

    start: int = 32
    guidance: float = 3.0

    def __post_init__(self) -> None:
        if self.start < 2 or self.start & (self.start - 1):
            raise UserError(f"progressive.start is {self.start}: a power of two of at least 2 is expected")


def grid_times(last: int, count: int) -> Tensor:
    """Times (count + 1,) from -1, which stands for clean, to `last` at equal distances."""
    return torch.linspace(-1, last, count + 1).round().long()


def ddim(model: ScoreModel, prediction: Prediction, to: Tensor) -> Tensor:
    """One DDIM step to times (B,); -1 is clean."""
    moved = model.schedule.add_noise(prediction.x0, prediction.eps, to.clamp_min(0))
    return torch.where((to < 0)[:, None, None, None], prediction.x0, moved)


@final
class Consistency(Method):
    """The student's answers at two neighbouring points of the guided teacher's trajectory must agree."""

    def __init__(self, teacher: Distillable, student: Student, options: ConsistencyOptions) -> None:
        self.teacher, self.options = teacher, options
        self.target = copy.deepcopy(student).requires_grad_(False)

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """Pseudo-Huber distance (Song & Dhariwal 2023, arXiv:2310.14189, eq. 8) to the target's answer one step of the teacher's ODE on."""
        times = grid_times(student.times[0], self.options.grid)
        place = torch.randint(1, len(times), (len(batch.real),), generator=generator)
        t, before = times[place].to(batch.real.device), times[place - 1].to(batch.real.device)
        x_t = student.schedule.add_noise(batch.real, batch.noise, t)
        with torch.no_grad():
            _average(self.target, student, self.options.ema)
            guided = Guided(self.teacher, batch.empty, self.options.guidance)
            x_s = ddim(guided, guided.predict(x_t, t, batch.states), before)
            told = self.target.predict(x_s, before.clamp_min(0), batch.states).x0
            wanted = torch.where((before < 0)[:, None, None, None], x_s, told)
        distance = (student.predict(x_t, t, batch.states).x0 - wanted).square().sum((1, 2, 3))
        c = self.options.huber * math.sqrt(wanted[0].numel())
        loss = ((distance + c**2).sqrt() - c).mean()
        return Outcome(loss, None, {"consistency": loss.detach()})

    def parts(self) -> dict[str, Any]:
        """The averaged target."""
        return {"target": self.target}

    def cost(self, progress: float) -> float:
        """Student forth and back, target once, teacher once or guided."""
        return 4 + (1 if self.options.guidance == 1 else 2)


@torch.no_grad()
def _average(target: Student, student: Student, decay: float) -> None:
    torch._foreach_lerp_(list(target.parameters()), [p.detach() for p in student.parameters()], 1 - decay)


@final
class Progressive(Method):
    """The student learns to do in one step what its teacher does in two; then it is the teacher."""

    def __init__(self, teacher: Distillable, student: Student, options: ProgressiveOptions) -> None:
        self.teacher, self.options = teacher, options
        self.stages = int(math.log2(options.start))
        self.former = copy.deepcopy(student).requires_grad_(False)  # the student of the stage before
        self.stage = torch.zeros((), dtype=torch.long)

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """Squared error of x0, weighted by max(SNR, 1) (eq. 9), to the x0 whose one step lands where two of the teacher do (eq. 26)."""
        stage = min(int(progress * self.stages), self.stages - 1)
        if stage != int(self.stage):
            self.former.load_state_dict(student.state_dict())
            self.stage.fill_(stage)
        steps = self.options.start >> (stage + 1)  # the student's at this stage
        times = grid_times(student.times[0], 2 * steps)
        place = 2 * torch.randint(1, steps + 1, (len(batch.real),), generator=generator)
        t, middle, end = (times[place - k].to(batch.real.device) for k in range(3))
        x_t = student.schedule.add_noise(batch.real, batch.noise, t)
        with torch.no_grad():
            model: ScoreModel = (
                Guided(self.teacher, batch.empty, self.options.guidance)
                if stage == 0
                else StudentDenoiser(self.former)
            )
            halfway = ddim(model, model.predict(x_t, t, batch.states), middle)
            arrived = ddim(model, model.predict(halfway, middle, batch.states), end)
            wanted = ddim_target(student, x_t, arrived, t, end)
        alpha, sigma = student.schedule.alpha(t), student.schedule.sigma(t)
        error = (student.predict(x_t, t, batch.states).x0 - wanted).square() * (
            alpha / sigma
        ).square().clamp_min(1.0)
        loss = error.sum((1, 2, 3)).mean() / 2
        return Outcome(loss, None, {"progressive": loss.detach(), "steps": torch.tensor(float(steps))})

    def parts(self) -> dict[str, Any]:
        """The stage's teacher and which stage it is."""
        return {
            "former": self.former,
            "stage": torch.nn.ParameterList([torch.nn.Parameter(self.stage, requires_grad=False)]),
        }

    def cost(self, progress: float) -> float:
        """Student forth and back, two steps of its teacher, guided in the first stage."""
        return 3 + 2 * (2 if progress * self.stages < 1 and self.options.guidance != 1 else 1)


def ddim_target(student: Student, x_t: Tensor, arrived: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """The x0 for which one DDIM step from x_t at t gives `arrived` at `end` (-1: clean)."""
    clean = (end < 0)[:, None, None, None]
    alpha, sigma = (
        torch.where(clean, torch.full_like(a, one), a)
        for a, one in (
            (student.schedule.alpha(end.clamp_min(0)), 1.0),
            (student.schedule.sigma(end.clamp_min(0)), 0.0),
        )
    )
    ratio = sigma / student.schedule.sigma(t)
    return (arrived - ratio * x_t) / (alpha - ratio * student.schedule.alpha(t))


@final
class StudentDenoiser(ScoreModel):
    """A student as a score model."""

    def __init__(self, student: Student) -> None:
        self.student, self.schedule = student, student.schedule

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """As the contract says."""
        return self.student.predict(x_t, t, condition)
