"""The student: a denoiser that answers clean latents from pure noise, in one call or a few."""

import copy
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from distill.core.noise import NoiseSchedule, PredictionType
from distill.core.score import Prediction
from distill.runtime.errors import UserError
from distill.teacher.latent import Distillable, UNetDenoiser


@dataclass(frozen=True)
class StudentOptions:
    """How a student is asked.

    `level` is sigma / alpha of the time that it takes pure noise for (SiD, arXiv:2404.04057, starts at 2.5; null: the schedule's
    last, as DMD); with `steps` above 1 the rest of its times lie at equal distances below. `parameterisation` sample reads
    the network's answer as x0, otherwise as the teacher's kind.
    """

    level: float | None = 2.5
    steps: int = 1
    parameterisation: Literal["teacher", "sample"] = "teacher"

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.level is not None and self.level <= 0):
            raise UserError(
                f"a student of {self.steps} steps from the level {self.level}: at least 1 step and a level above 0 are needed"
            )


def student_times(schedule: NoiseSchedule, options: StudentOptions) -> tuple[int, ...]:
    """Its times, falling. Raises `UserError` where there are fewer levels than steps."""
    last = (
        schedule.num_train_timesteps - 1
        if options.level is None
        else int(schedule.sigma_to_t(torch.tensor([options.level])))
    )
    if last + 1 < options.steps:
        raise UserError(
            f"a student of {options.steps} steps cannot start at t = {last}: give a higher level or fewer steps"
        )
    return spaced_times(last + 1, options.steps)


def spaced_times(levels: int, steps: int) -> tuple[int, ...]:
    """`steps` times at equal distances below `levels`, falling, as diffusers' LCMScheduler spaces them."""
    apart = levels // steps
    return tuple(apart * k - 1 for k in range(steps, 0, -1))


def rounding_error(schedule: NoiseSchedule, t: int, kind: PredictionType, dtype: torch.dtype) -> float:
    """Root-mean-square error of x0 at t where the network's answer, of unit size, is rounded to `dtype`.

    x0 = (x - sigma eps) / alpha multiplies it by sigma / alpha, x0 = alpha x - sigma v by sigma.
    """
    answer = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    rounded = float((answer.to(dtype).float() - answer).square().mean().sqrt())
    place = torch.tensor([t])
    alpha, sigma = float(schedule.alpha(place)), float(schedule.sigma(place))
    return (
        rounded
        * {"epsilon": sigma / alpha if alpha else float("inf"), "v_prediction": sigma, "sample": 1.0}[kind]
    )


def chosen_time(schedule: NoiseSchedule, options: StudentOptions, kind: PredictionType) -> str:
    """A sentence on the conditioning time and what half precision would do to x0 there."""
    t = student_times(schedule, options)[0]
    place = torch.tensor([t])
    level = float(schedule.sigma(place) / schedule.alpha(place))
    errors = [
        f"{rounding_error(schedule, t, kind, dtype):.4f} in {name}"
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.half))
    ]
    return f"pure noise is taken for t = {t} (sigma / alpha {level:.3g}); rounding the network's answer errs x0 by {' and '.join(errors)}"


@final
class Student(nn.Module):
    """A denoiser with the times it is asked at. Starts as the teacher, exactly."""

    def __init__(
        self, unet: nn.Module, schedule: NoiseSchedule, kind: PredictionType, times: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.unet, self.schedule, self.kind, self.times = unet, schedule, kind, times

    @staticmethod
    def of(teacher: Distillable, options: StudentOptions) -> "Student":
        """A trainable copy of a teacher's network."""
        unet = copy.deepcopy(teacher.unet).float().requires_grad_(True)
        times, kind = student_times(teacher.schedule, options), teacher.score.prediction_type
        if options.parameterisation == "sample" and kind != "sample":
            if kind != "v_prediction":
                raise UserError(
                    "parameterisation=sample starts from a teacher that answers v or x0: this one answers eps"
                )
            _answer_sample(unet, float(teacher.schedule.sigma(torch.tensor(times[:1]))))
            kind = "sample"
        return Student(unet, teacher.schedule, kind, times)

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Prediction:
        """Differentiable prediction at integer times (B,); conversions in float32, whatever the network runs in."""
        return UNetDenoiser(self.unet, self.schedule, self.kind).predict(x_t, t, states)

    def clean(self, x_t: Tensor, index: int, states: Tensor) -> Tensor:
        """x0 (B, C, h, w) of its input at its `index`-th time."""
        t = torch.full((len(x_t),), self.times[index], device=x_t.device)
        return self.predict(x_t, t, states).x0

    def forward(self, noise: Tensor, states: Tensor, generator: torch.Generator) -> Tensor:
        """Latents (B, C, h, w) from standard normal noise under text states (B, L, D); steps after the first draw fresh noise."""
        last = len(self.times) - 1
        return self.clean(self.simulate(noise, states, last, generator), last, states)

    @torch.no_grad()
    def simulate(self, noise: Tensor, states: Tensor, index: int, generator: torch.Generator) -> Tensor:
        """What it meets at its `index`-th time when it samples: its own answers, made noisy again (DMD2, arXiv:2405.14867, section 4.5)."""
        x_t = noise
        for step in range(index):
            fresh = torch.randn(noise.shape, generator=generator).to(noise)
            t = torch.full((len(noise),), self.times[step + 1], device=noise.device)
            x_t = self.schedule.add_noise(self.clean(x_t, step, states), fresh, t)
        return x_t


@torch.no_grad()
def _answer_sample(unet: Any, sigma: float) -> None:
    """Make a network that answers v answer -sigma v: x0 at the last level, where alpha is 0, and near it elsewhere."""
    for value in unet.conv_out.parameters():
        value.mul_(-sigma)
