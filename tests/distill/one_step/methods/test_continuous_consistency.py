"""sCM against closed forms: the derivative along the ODE, its fixed point, its tangent and its limits."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule
from distill.core.teacher import Denoiser
from distill.one_step.methods.base import Batch
from distill.one_step.methods.continuous_consistency import (
    ContinuousConsistency,
    ContinuousConsistencyOptions,
    velocity,
    velocity_and_derivative,
)
from distill.one_step.student import GuidanceEmbedding, Student, StudentOptions
from distill.runtime.errors import UserError
from distill.teacher.latent import LatentDiffusionTeacher
from distill.teacher.mixture import Mixture, MixtureTeacher

MEAN, STD = 0.4, 0.6
TEXT = Conditioning(torch.ones(1, 1, 1, dtype=torch.float64))


class NormalConsistency(Denoiser):
    """The consistency function of normal data, in v: f = mean + std (x - alpha mean) / std of x_t."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__(None, schedule, "v_prediction")

    def output(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        angles = self.schedule.angle(torch.arange(self.schedule.num_train_timesteps)).to(x_t)
        index = t.detach().floor().long().clamp(0, len(angles) - 2)
        angle = angles[index] + (t - index) * (angles[index + 1] - angles[index])
        alpha, sigma = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
        x0 = MEAN + STD * (x_t - alpha * MEAN) / (alpha.square() * STD**2 + sigma.square()).sqrt()
        return (alpha * x_t - x0) / sigma

    def trainable_copy(self) -> "Denoiser":
        return self

    def limit_time_frequency(self, highest: float) -> None:
        assert highest == 0.01


def normal_teacher(schedule: NoiseSchedule) -> MixtureTeacher:
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    return MixtureTeacher(Mixture(MEAN * one, STD * one, one.flatten(), ("x",)), schedule)


def points(schedule: NoiseSchedule, count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, schedule.num_train_timesteps, (count,), generator=generator)


def test_angles_are_those_of_the_schedule_and_invertible(schedule: NoiseSchedule) -> None:
    t = torch.arange(schedule.num_train_timesteps)
    angle = schedule.angle(t)
    torch.testing.assert_close(angle.cos(), schedule.alpha(t).flatten())
    torch.testing.assert_close(angle.sin(), schedule.sigma(t).flatten())
    torch.testing.assert_close(schedule.angle_to_t(angle), t.float(), atol=2e-2, rtol=0)
    middle = (angle[1:] + angle[:-1]) / 2
    torch.testing.assert_close(schedule.angle_to_t(middle), t[1:] - 0.5, atol=2e-2, rtol=0)
    assert schedule.angle_to_t(torch.tensor([0.0, 1.6])).tolist() == [0, len(t) - 1]


def test_x0_of_the_exact_consistency_function_is_constant_along_the_ode(schedule: NoiseSchedule) -> None:
    """The tangent is zero there, and that of the teacher's own denoiser is not."""
    x, t = points(schedule)
    teacher, exact = normal_teacher(schedule), NormalConsistency(schedule)
    direction = teacher.predict(x, t, TEXT.expand(len(x))).v
    alpha, sigma, angle = schedule.alpha(t).double(), schedule.sigma(t).double(), schedule.angle(t).double()
    own, derivative = velocity_and_derivative(exact, x, angle, TEXT, direction)
    tangent = ContinuousConsistency.tangent(x, own, direction, derivative, alpha, sigma)
    assert tangent.abs().max() < 2e-3

    # of x0 = E[x0 | x_t], by hand: with w = alpha std^2 / var, E = mean + w (x - alpha mean)
    step = 1e-4
    means = []
    for sign in (-1, 1):
        a, s = (
            (angle + sign * step).cos()[:, None, None, None],
            (angle + sign * step).sin()[:, None, None, None],
        )
        moved = x + sign * step * direction
        means.append(MEAN + a * STD**2 / (a.square() * STD**2 + s.square()) * (moved - a * MEAN))
    expected = alpha * (means[1] - means[0]) / (2 * step)
    a = angle.cos()[:, None, None, None]

    class Own(NormalConsistency):
        def output(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            angles = self.schedule.angle(torch.arange(self.schedule.num_train_timesteps)).to(x_t)
            index = t.detach().floor().long().clamp(0, len(angles) - 2)
            angle = angles[index] + (t - index) * (angles[index + 1] - angles[index])
            a, s = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
            x0 = MEAN + a * STD**2 / (a.square() * STD**2 + s.square()) * (x_t - a * MEAN)
            return (a * x_t - x0) / s

    own, derivative = velocity_and_derivative(Own(schedule), x, angle, TEXT, direction)
    tangent = ContinuousConsistency.tangent(x, own, direction, derivative, a, sigma)
    torch.testing.assert_close(tangent, expected, atol=5e-3, rtol=5e-3)
    assert tangent.abs().mean() > 0.05


def test_the_derivative_of_a_u_net_is_its_finite_difference(tiny_teacher: LatentDiffusionTeacher) -> None:
    denoiser = tiny_teacher.denoiser
    generator = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(3, *tiny_teacher.latent_shape, generator=generator) for _ in range(2))
    conditioning = tiny_teacher.encode_text(["a red cube"]).expand(3)
    angle, step = torch.tensor([0.4, 0.9, 1.3]), 2e-4
    with torch.no_grad():
        value, derivative = velocity_and_derivative(denoiser, x, angle, conditioning, direction)
        ahead, before = (
            velocity(denoiser, x + sign * step * direction, angle + sign * step, conditioning)
            for sign in (1, -1)
        )
        torch.testing.assert_close(value, velocity(denoiser, x, angle, conditioning))
    difference = (ahead - before) / (2 * step)
    assert (derivative - difference).norm() < 0.03 * difference.norm()


def test_a_derivative_inside_autocast_is_in_full_precision(tiny_teacher: LatentDiffusionTeacher) -> None:
    """Which `run.precision=bfloat16` trains in: the same as outside of it."""
    x, angle = torch.randn(2, *tiny_teacher.latent_shape), torch.tensor([0.4, 1.2])
    text, direction = tiny_teacher.encode_text(["a red cube", "a blue duck"]), torch.randn_like(x)
    expected = velocity_and_derivative(tiny_teacher.denoiser, x, angle, text, direction)
    with torch.autocast("cpu", torch.bfloat16):
        inside = velocity_and_derivative(tiny_teacher.denoiser, x, angle, text, direction)
    for value, other in zip(inside, expected, strict=True):
        torch.testing.assert_close(value, other)


def test_loss_by_hand_and_its_fixed_point(schedule: NoiseSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient on F is -2 g / (|g| + c); for the exact consistency function it is next to nothing."""
    teacher = normal_teacher(schedule)
    options = ContinuousConsistencyOptions(guidance=1.0, warmup=0.0)
    generator = torch.Generator().manual_seed(0)
    real = MEAN + STD * torch.randn(64, 1, 1, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(64, 1, 1, 1, generator=generator, dtype=torch.float64)
    batch = Batch(TEXT.expand(64), TEXT, real, noise)
    student = Student(NormalConsistency(schedule), (999,))
    method = ContinuousConsistency(SimpleNamespace(teacher=teacher, student=student), options)  # type: ignore[arg-type]
    outcome = method.loss(student, batch, 0.5, torch.Generator().manual_seed(1))
    assert float(outcome.loss) < 1e-3 and float(outcome.metrics["tangent"]) < 1e-2

    tangents: list[Tensor] = []
    original = ContinuousConsistency.tangent

    def fixed(*args: Any) -> Tensor:
        tangents.append(original(*args) + 0.3)
        return tangents[-1]

    monkeypatch.setattr(ContinuousConsistency, "tangent", staticmethod(fixed))
    outcome = method.loss(student, batch, 0.5, torch.Generator().manual_seed(1))
    assert float(outcome.loss) == pytest.approx((0.3 / 0.4) ** 2, rel=0.02)


def test_warm_up_grows_the_second_term_alone() -> None:
    x, own, direction, derivative = (torch.full((1, 1, 1, 1), value) for value in (1.0, 2.0, 0.5, 3.0))
    alpha, sigma = torch.tensor(0.6), torch.tensor(0.8)
    for ramp in (0.0, 0.5, 1.0):
        tangent = ContinuousConsistency.tangent(x, own, direction, derivative, alpha, sigma, ramp)
        assert float(tangent) == pytest.approx(-0.36 * 1.5 - ramp * 0.48 * 4.0)


def test_the_first_part_learns_the_teachers_velocity(schedule: NoiseSchedule) -> None:
    """With the exact consistency function as the student: its distance to v, at uniform times."""
    teacher, student = normal_teacher(schedule), Student(NormalConsistency(schedule), (999,))
    context = SimpleNamespace(teacher=teacher, student=student)
    method = ContinuousConsistency(context, ContinuousConsistencyOptions(guidance=1.0))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    real, noise = (torch.randn(8, 1, 1, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    outcome = method.loss(student, Batch(TEXT.expand(8), TEXT, real, noise), 0.05, generator.manual_seed(1))
    t = torch.randint(1000, (8,), generator=generator.manual_seed(1))
    x_t = schedule.add_noise(real, noise, t)
    expected = teacher.predict(x_t, t, TEXT.expand(8)).v - student.predict(x_t, t, TEXT).v
    assert float(outcome.loss) == pytest.approx(float(expected.square().mean()))
    assert method.cost(0.05) == 4 and method.cost(0.5) == 6


def test_a_limited_u_net_reads_low_frequencies_only(tiny_teacher: LatentDiffusionTeacher) -> None:
    """Its derivative by the time is bounded, also after updates; the saved weights need no mask."""
    denoiser = tiny_teacher.denoiser.trainable_copy()
    denoiser.limit_time_frequency(0.01)
    network, generator = denoiser.network, torch.Generator().manual_seed(0)
    x = torch.randn(1, *tiny_teacher.latent_shape, generator=generator)
    conditioning = tiny_teacher.encode_text(["a red cube"])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(2):
        denoiser.output(x, torch.tensor([300]), conditioning).square().mean().backward()
        optimizer.step()
    half = network.time_proj.num_channels // 2
    frequencies = torch.exp(-torch.arange(half) / half * torch.log(torch.tensor(1e4)))
    columns = network.time_embedding.linear_1.weight.abs().amax(0).view(2, half)
    assert 0 < (frequencies > 0.01).sum() < half
    assert columns[:, frequencies > 0.01].max() == 0 and columns[:, frequencies <= 0.01].min() > 0
    stock = type(network).from_config(network.config)
    stock.load_state_dict(network.state_dict())
    same = denoiser.with_network(stock).output(x, torch.tensor([300]), conditioning)
    torch.testing.assert_close(same, denoiser.output(x, torch.tensor([300]), conditioning))


def test_students_with_other_boundary_conditions_are_refused(tiny_teacher: LatentDiffusionTeacher) -> None:
    student = StudentOptions(sigma_max=None)
    for options in (
        replace(student, timestep_scaling=10.0),
        replace(student, guidance_embedding=GuidanceEmbedding(32, 3.0)),
    ):
        context = SimpleNamespace(teacher=tiny_teacher, student=Student.from_teacher(tiny_teacher, options))
        with pytest.raises(UserError, match="boundary conditions of its own"):
            ContinuousConsistencyOptions().build(context)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="positive log_std"):
        ContinuousConsistencyOptions(log_std=0.0)
    with pytest.raises(UserError, match=r"adapt=0.6 and warmup=0.5: fractions"):
        ContinuousConsistencyOptions(adapt=0.6, warmup=0.5)
