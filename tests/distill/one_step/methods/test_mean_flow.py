"""Mean flow against closed forms: the average velocity of a normal's ODE, its identity, its network input."""

from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from diffusers import DiffusionPipeline
from interval_network import IntervalNetwork
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import FlowSchedule, NoiseSchedule
from distill.core.teacher import INTERVAL_START
from distill.one_step.folder import load_student, save_student
from distill.one_step.methods.base import Batch
from distill.one_step.methods.derivatives import value_and_derivative
from distill.one_step.methods.mean_flow import MeanFlow, MeanFlowOptions, average_velocity, mean_of_halves
from distill.one_step.student import Student, StudentOptions
from distill.runtime.errors import UserError
from distill.teacher.latent import LatentDiffusionTeacher
from distill.teacher.mixture import Mixture, MixtureTeacher

MEAN, STD = 0.4, 0.6
TEXT = Conditioning(torch.ones(1, 1, 1, dtype=torch.float64))


def end_of_ode(z: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """z_r of z (B, 1, 1, 1) at s for normal data: (z - (1 - s) mean) / std stays as it is."""
    s, r = s[:, None, None, None], r[:, None, None, None]
    std_s, std_r = (((1 - time).square() * STD**2 + time.square()).sqrt() for time in (s, r))
    return (1 - r) * MEAN + std_r * (z - (1 - s) * MEAN) / std_s


class NormalMeanFlow(IntervalNetwork):
    """The exact average velocity."""

    def output(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        s = (t + 1) / self.schedule.num_train_timesteps
        start = conditioning.extras.get(INTERVAL_START)
        r = torch.zeros_like(s) if start is None else torch.minimum(start.to(s), s - 1e-6)
        norm = ((1 - s).square() + s.square()).sqrt()[:, None, None, None]
        z, length = x_t * norm, (s - r)[:, None, None, None]
        return (z - end_of_ode(z, s, r)) / length


def normal_teacher(schedule: NoiseSchedule) -> MixtureTeacher:
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    return MixtureTeacher(Mixture(MEAN * one, STD * one, one.flatten(), ("x",)), schedule)


def test_the_average_velocity_of_normal_data_fulfils_the_identity() -> None:
    """U = v - (s - r) dU/ds with v the teacher's; without the derivative it does not."""
    schedule = FlowSchedule()
    teacher, exact = normal_teacher(schedule), NormalMeanFlow(schedule)
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(100, 999, (50,), generator=generator)
    s = (t + 1).double() / 1000
    r = s * torch.rand(50, generator=generator, dtype=torch.float64) * 0.9
    x_t = torch.randn(50, 1, 1, 1, generator=generator, dtype=torch.float64)
    z = x_t * ((1 - s).square() + s.square()).sqrt()[:, None, None, None]
    v = teacher.predict(x_t, t, TEXT.expand(50)).flow

    def average(z: Tensor, s: Tensor) -> Tensor:
        return average_velocity(exact, z, r, s, TEXT.expand(50))

    value, derivative = value_and_derivative(exact, average, (z, s), (v, torch.ones_like(s)))
    length = (s - r)[:, None, None, None]
    torch.testing.assert_close(value, v - length * derivative, atol=1e-4, rtol=1e-4)
    assert (value - v).abs().max() > 0.1
    step = 1e-5
    ahead, before = (average(z + sign * step * v, s + sign * step) for sign in (1, -1))
    torch.testing.assert_close(derivative, (ahead - before) / (2 * step), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("target", ["derivative", "halves"])
def test_the_exact_average_velocity_is_a_fixed_point(target: Literal["derivative", "halves"]) -> None:
    """And its x0 is the end of the ODE, in one step."""
    schedule = FlowSchedule()
    teacher, student = normal_teacher(schedule), Student(NormalMeanFlow(schedule), (999,))
    context = SimpleNamespace(teacher=teacher, student=student)
    options = MeanFlowOptions(guidance=1.0, target=target, intervals=1.0, weight_power=0.0)
    method = MeanFlow(context, options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    real = MEAN + STD * torch.randn(64, 1, 1, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(64, 1, 1, 1, generator=generator, dtype=torch.float64)
    outcome = method.loss(student, Batch(TEXT.expand(64), TEXT, real, noise), 0.5, generator)
    assert float(outcome.loss) < 1e-4
    samples = student(noise, TEXT.expand(64), generator)
    torch.testing.assert_close(samples, MEAN + STD * noise, atol=1e-4, rtol=1e-4)


def test_halves_by_hand(schedule: NoiseSchedule) -> None:
    """Two Euler steps of a network whose flow is its input and the start; v where there is no interval."""

    class Linear(IntervalNetwork):
        def output(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            s = ((t + 1) / self.schedule.num_train_timesteps)[:, None, None, None]
            z = x_t * ((1 - s).square() + s.square()).sqrt()
            return 3 * z + conditioning.extras[INTERVAL_START][:, None, None, None]

    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    times = {name: torch.tensor([value], dtype=torch.float64) for name, value in (("r", 0.2), ("s", 0.6))}
    linear = Linear(FlowSchedule())
    target = mean_of_halves(linear, 0.5 * one, times["r"], times["s"], 9 * one, TEXT)
    first = 3 * 0.5 + 0.4
    second = 3 * (0.5 - 0.2 * first) + 0.2
    assert float(target) == pytest.approx((first + second) / 2, abs=1e-3)
    at_a_point = mean_of_halves(linear, 0.5 * one, times["s"], times["s"], 9 * one, TEXT)
    assert float(at_a_point) == 9


def test_weights_by_hand(schedule: NoiseSchedule) -> None:
    """With p = 1 every sample's loss is |e|^2 / (|e|^2 + c): next to 1 for a student that is wrong."""

    class Wrong(NormalMeanFlow):
        def output(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            return 0 * x_t + 10.0

    teacher, student = normal_teacher(schedule), Student(Wrong(schedule), (999,))
    method = MeanFlow(
        SimpleNamespace(teacher=teacher, student=student), MeanFlowOptions(guidance=1.0, weight_power=1.0)
    )  # type: ignore[arg-type]
    one = torch.ones(4, 1, 1, 1, dtype=torch.float64)
    outcome = method.loss(student, Batch(TEXT.expand(4), TEXT, one, -one), 0.0, torch.Generator())
    assert float(outcome.loss) == pytest.approx(1.0, abs=1e-3)
    assert float(outcome.metrics["mean_flow"]) > 10


def test_an_interval_from_0_is_the_same_as_none(tiny_teacher: LatentDiffusionTeacher, tmp_path: Path) -> None:
    """So a trained student samples without the input, and its folder is a stock pipeline."""
    student = Student.from_teacher(tiny_teacher, StudentOptions(sigma_max=None))
    denoiser, generator = student.denoiser, torch.Generator().manual_seed(0)
    denoiser.add_interval_start(8)
    with torch.no_grad():
        weight = denoiser.network.time_embedding.cond_proj.weight
        weight.copy_(torch.randn(weight.shape, generator=generator))
    noise = torch.randn(2, *tiny_teacher.latent_shape, generator=generator)
    text, t = tiny_teacher.encode_text(["a red cube"] * 2), torch.tensor([999, 999])
    plain = denoiser.output(noise, t, text)
    from_zero = denoiser.output(noise, t, text.with_extras(**{INTERVAL_START: torch.zeros(2)}))
    from_half = denoiser.output(noise, t, text.with_extras(**{INTERVAL_START: torch.full((2,), 0.5)}))
    torch.testing.assert_close(plain, from_zero)
    assert (plain - from_half).abs().max() > 1e-3

    save_student(tmp_path / "student", student, tiny_teacher)
    loaded, _ = load_student(tmp_path / "student")
    assert loaded.denoiser.network.config.time_cond_proj_dim is None
    expected = student(noise, text, generator)
    torch.testing.assert_close(loaded(noise, text, generator), expected, atol=2e-2, rtol=2e-2)
    assert DiffusionPipeline.from_pretrained(tmp_path / "student").unet.config.time_cond_proj_dim is None


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"intervals in \(0, 1\] and from_zero in \[0, 1\], not 0 and 0.5"):
        MeanFlowOptions(intervals=0.0)
    with pytest.raises(UserError, match="a positive logit_std"):
        MeanFlowOptions(features=0)
