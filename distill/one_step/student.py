"""The student: a denoiser that generates clean latents from pure noise in one or a few function
evaluations.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule, PredictionType
from distill.core.score import Prediction
from distill.core.teacher import GUIDANCE, Denoiser, Teacher
from distill.runtime.errors import UserError

SIGMA_DATA = 0.5  # standard deviation of the data in the boundary scalings, as in LCMScheduler


@dataclass(frozen=True)
class GuidanceEmbedding:
    """The CFG scale as an input: sines and cosines of it are projected into the time embedding.

    LCM, arXiv:2310.04378, section 4.2; diffusers' `time_cond_proj_dim`.
    """

    dim: int = 256  # the number of sines and cosines
    guidance: float = 8.0  # the scale that it samples with where no other is given

    def __post_init__(self) -> None:
        if self.dim < 4 or self.dim % 2 or self.guidance < 1:
            raise UserError(
                f"a guidance embedding of {self.dim} numbers that samples at {self.guidance}: "
                "an even dim of at least 4 and a guidance of at least 1 are needed"
            )


@dataclass(frozen=True)
class StudentOptions:
    """The timesteps a student is evaluated at, and how its output is read."""

    # sigma / alpha of the time whose input is taken to be pure noise (SiD, arXiv:2404.04057, starts at 2.5);
    # null: the schedule's last, as DMD
    sigma_max: float | None = 2.5
    steps: int = 1  # the further timesteps lie at equal distances below the first
    parameterisation: Literal["teacher", "sample"] = "teacher"  # sample: the output is x0
    # the timesteps are chosen from so many at equal distances, which also allows any lower number of steps
    # (LCM: 50, diffusers' original_inference_steps)
    grid: int | None = None
    # x0 becomes c_skip x_t + c_out x0, which is x_t at t = 0 (`boundary_scalings`; LCM: 10); null: x0 itself
    timestep_scaling: float | None = None
    guidance_embedding: GuidanceEmbedding | None = None  # the CFG scale as an input of the network (LCM)

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.sigma_max is not None and self.sigma_max <= 0):
            raise UserError(
                f"a student of {self.steps} steps from sigma_max {self.sigma_max}: "
                "at least 1 step and a sigma_max above 0 are needed"
            )
        if self.grid is not None and self.grid < self.steps:
            raise UserError(f"a grid of {self.grid} times has no {self.steps} steps: raise it or lower steps")
        if self.timestep_scaling is not None and self.timestep_scaling <= 0:
            raise UserError(f"timestep_scaling is {self.timestep_scaling}: expected null or a number above 0")


def student_timesteps(schedule: NoiseSchedule, options: StudentOptions) -> tuple[int, ...]:
    """The timesteps, falling. Raises `UserError` where there are fewer levels than steps."""
    last = schedule.num_train_timesteps - 1
    if options.sigma_max is not None:
        last = int(schedule.sigma_to_t(torch.tensor([options.sigma_max])))
    if last + 1 < max(options.steps, options.grid or 0):
        raise UserError(
            f"a student of {options.steps} steps cannot start at t = {last}: "
            "give a higher sigma_max or fewer steps"
        )
    return spaced_timesteps(last + 1, options.steps, options.grid)


def spaced_timesteps(levels: int, steps: int, grid: int | None = None) -> tuple[int, ...]:
    """`steps` times, falling, of `grid` (by default as many) at equal distances below `levels`.

    As diffusers' LCMScheduler spaces them, whose original_inference_steps is `grid`.
    """
    count = steps if grid is None else grid
    distance = levels // count
    return tuple(distance * (count - index * count // steps) - 1 for index in range(steps))


def boundary_scalings(t: Tensor, timestep_scaling: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out (B, 1, 1, 1) at times (B,): 1 and 0 at t = 0, near 0 and 1 above.

    Of consistency models (Song et al. 2023, arXiv:2303.01469, eq. 5), as LCMScheduler computes them.
    """
    scaled = (timestep_scaling * t.float())[:, None, None, None]
    total = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total.sqrt()


def rounding_error(
    schedule: NoiseSchedule, t: int, prediction_type: PredictionType, dtype: torch.dtype
) -> float:
    """Root-mean-square error of x0 at t where a network output of unit variance is rounded to `dtype`.

    x0 = (x - sigma eps) / alpha multiplies it by sigma / alpha, x0 = alpha x - sigma v by sigma, and
    x0 = (x - sigma (eps - x0)) / (alpha + sigma) by sigma / (alpha + sigma).
    """
    output = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    error = float((output.to(dtype).float() - output).square().mean().sqrt())
    index = torch.tensor([t])
    alpha, sigma = float(schedule.alpha(index)), float(schedule.sigma(index))
    factors: dict[PredictionType, float] = {
        "epsilon": sigma / alpha if alpha else float("inf"),
        "v_prediction": sigma,
        "sample": 1.0,
        "flow_prediction": sigma / (alpha + sigma),
    }
    return error * factors[prediction_type]


def describe_timestep(
    schedule: NoiseSchedule, options: StudentOptions, prediction_type: PredictionType
) -> str:
    """A sentence on the first timestep and on the error that half precision makes in x0 there."""
    t = student_timesteps(schedule, options)[0]
    index = torch.tensor([t])
    ratio = float(schedule.sigma(index) / schedule.alpha(index))
    errors = [
        f"{rounding_error(schedule, t, prediction_type, dtype):.4f} in {name}"
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.half))
    ]
    return (
        f"the student's input is pure noise at t = {t} (sigma / alpha {ratio:.3g}); "
        f"rounding its output causes an RMS error of x0 of {' and '.join(errors)}"
    )


@final
class Student(nn.Module):
    """A denoiser with the timesteps it is evaluated at. Initialised equal to the teacher."""

    def __init__(
        self,
        denoiser: Denoiser,
        timesteps: tuple[int, ...],
        grid: int | None = None,
        timestep_scaling: float | None = None,
        guidance: float | None = None,
    ) -> None:
        """grid, timestep_scaling: as of `StudentOptions`.

        guidance: the CFG scale that it samples with, where that is an input of its network.
        """
        super().__init__()
        self.denoiser, self.timesteps = denoiser, timesteps
        self.grid, self.timestep_scaling, self.guidance = grid, timestep_scaling, guidance

    @staticmethod
    def from_teacher(teacher: Teacher, options: StudentOptions) -> "Student":
        """A trainable copy of a teacher's denoiser. Raises `UserError` for options it cannot have."""
        denoiser, timesteps = teacher.trainable_copy(), student_timesteps(teacher.schedule, options)
        if options.parameterisation == "sample":
            denoiser = denoiser.as_x0_predictor(timesteps[0])
        embedding = options.guidance_embedding
        if embedding is not None:
            denoiser = denoiser.with_guidance_embedding(embedding.dim)
        guidance = None if embedding is None else embedding.guidance
        return Student(denoiser, timesteps, options.grid, options.timestep_scaling, guidance)

    def with_denoiser(self, denoiser: Denoiser, guidance: float | None = None) -> "Student":
        """The same student with another denoiser, and with another CFG scale where that is an input."""
        scale = self.guidance if guidance is None or self.guidance is None else guidance
        return Student(denoiser, self.timesteps, self.grid, self.timestep_scaling, scale)

    @property
    def schedule(self) -> NoiseSchedule:
        """The teacher's noise schedule."""
        return self.denoiser.schedule

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """Differentiable prediction at integer times (B,); conversions are computed in float32.

        A guidance scale that is an input is `extras["guidance"]` (B,) of the conditioning, else its own.
        """
        if self.guidance is not None and GUIDANCE not in conditioning.extras:
            scales = torch.full((len(x_t),), self.guidance, device=x_t.device)
            conditioning = conditioning.with_extras(**{GUIDANCE: scales})
        prediction = self.denoiser.predict(x_t, t, conditioning)
        if self.timestep_scaling is None:
            return prediction
        c_skip, c_out = boundary_scalings(t, self.timestep_scaling)
        return prediction.with_x0(c_skip * x_t + c_out * prediction.x0)

    def predict_x0(self, x_t: Tensor, index: int, conditioning: Conditioning) -> Tensor:
        """x0 (B, C, h, w) of its input at its `index`-th timestep."""
        t = torch.full((len(x_t),), self.timesteps[index], device=x_t.device)
        return self.predict(x_t, t, conditioning).x0

    def forward(self, noise: Tensor, conditioning: Conditioning, generator: torch.Generator) -> Tensor:
        """Latents (B, C, h, w) from standard normal noise; steps after the first add fresh noise."""
        last = len(self.timesteps) - 1
        x_t = self.backward_simulation(noise, conditioning, last, generator)
        return self.predict_x0(x_t, last, conditioning)

    @torch.no_grad()
    def backward_simulation(
        self, noise: Tensor, conditioning: Conditioning, index: int, generator: torch.Generator
    ) -> Tensor:
        """Its input at the `index`-th timestep when it samples: its own x0, noised again.

        DMD2, arXiv:2405.14867, section 4.5.
        """
        x_t = noise
        for step in range(index):
            fresh = torch.randn(noise.shape, generator=generator).to(noise)
            t = torch.full((len(noise),), self.timesteps[step + 1], device=noise.device)
            x_t = self.schedule.add_noise(self.predict_x0(x_t, step, conditioning), fresh, t)
        return x_t
