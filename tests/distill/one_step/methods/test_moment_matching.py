"""Inductive moment matching: its discrepancy and weights by hand, and fixed points in closed form."""

import math
from types import SimpleNamespace

import pytest
import torch
from interval_network import IntervalNetwork
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import FlowSchedule, NoiseSchedule
from distill.core.teacher import INTERVAL_START
from distill.one_step.methods.base import Batch
from distill.one_step.methods.moment_matching import (
    MomentMatching,
    MomentMatchingOptions,
    earlier_time,
    squared_discrepancy,
    time_weight,
)
from distill.one_step.student import Student
from distill.runtime.errors import UserError

TEXT = Conditioning(torch.ones(1, 1, 1, dtype=torch.float64))
POINT = 0.4


class PointFlow(IntervalNetwork):
    """Of data in one point: its velocity (z - m) / s is the average velocity from any start."""

    def __init__(self, schedule: NoiseSchedule, point: float = POINT) -> None:
        super().__init__(schedule)
        self.point = point
        self.starts: list[Tensor] = []

    def output(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if INTERVAL_START in conditioning.extras:  # as a teacher it is given none
            self.starts.append(conditioning.extras[INTERVAL_START])
        s = ((t + 1) / self.schedule.num_train_timesteps)[:, None, None, None]
        z = x_t * ((1 - s).square() + s.square()).sqrt()
        return (z - self.point) / s


def batch_of(count: int, std: float) -> Batch:
    generator = torch.Generator().manual_seed(0)
    real = POINT + std * torch.randn(count, 1, 2, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 1, 2, 2, generator=generator, dtype=torch.float64)
    return Batch(TEXT.expand(count), TEXT, real, noise)


def method_of(student: Student, options: MomentMatchingOptions) -> MomentMatching:
    batch = batch_of(8, 0.0)
    context = SimpleNamespace(teacher=student.denoiser, student=student, example=batch)
    return options.build(context)  # type: ignore[arg-type]


def test_discrepancy_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    scale = torch.tensor([0.5, 1.0, 20.0], dtype=torch.float64)
    expected = []
    for x, y, factor in zip(first, second, scale.tolist(), strict=True):
        total = 0.0
        for i in range(4):
            for j in range(4):
                for sign, a, b in ((1, x[i], x[j]), (1, y[i], y[j]), (-2, x[i], y[j])):
                    total += sign * math.exp(-factor * float((a - b).norm()) / 5)
        expected.append(total / 16)
    assert squared_discrepancy(first, second, scale).tolist() == pytest.approx(expected)
    assert squared_discrepancy(first, first[:, [2, 0, 3, 1]], scale).tolist() == pytest.approx([0.0] * 3)


def test_the_gradient_is_finite_where_samples_are_equal() -> None:
    same = torch.ones(1, 2, 3, requires_grad=True)
    squared_discrepancy(same, same.detach(), torch.ones(1)).sum().backward()
    assert same.grad is not None and bool(same.grad.isfinite().all())


def test_earlier_time_lowers_the_noise_level_and_stops_at_s() -> None:
    t, s = torch.tensor([0.9, 0.5, 0.1, 0.5]), torch.tensor([0.0, 0.0, 0.0, 0.45])
    r = earlier_time(t, s, 0.2)
    assert (r / (1 - r))[:2].tolist() == pytest.approx([9.0 - 0.2, 1.0 - 0.2], rel=1e-5)
    assert r[2:].tolist() == pytest.approx([0.0, 0.45])


def test_time_weight_is_the_denoising_losss() -> None:
    """-d(log ratio)/dt by finite differences; sigma(b - log ratio), alpha^a over the variance, by hand."""
    t, step = torch.tensor([0.2, 0.7], dtype=torch.float64), 1e-6

    def log_ratio(t: Tensor) -> Tensor:
        return torch.log(((1 - t) / t) ** 2)

    fall = -(log_ratio(t + step) - log_ratio(t - step)) / (2 * step)
    sigmoid = 1 / (1 + torch.exp(log_ratio(t) - 5))
    expected = 0.5 * sigmoid * fall * (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    torch.testing.assert_close(time_weight(t, 5.0, 2.0), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("guidance", [None, 1.0])
def test_the_exact_student_of_a_point_is_a_fixed_point(guidance: float | None) -> None:
    """From t and from r it ends in the same sample; one of another point does not."""
    schedule = FlowSchedule()
    exact, wrong = (Student(PointFlow(schedule, point), (999,)) for point in (POINT, POINT + 0.5))
    options = MomentMatchingOptions(guidance=guidance, from_zero=0.5)
    generator = torch.Generator().manual_seed(1)
    method = method_of(exact, options)
    assert float(method.loss(exact, batch_of(64, 0.0), 0.0, generator).loss) < 1e-6
    outcome = method.loss(wrong, batch_of(64, 0.0), 0.0, torch.Generator().manual_seed(1))
    assert float(outcome.loss) > 1e-4


def test_a_group_has_one_end_and_some_end_at_0() -> None:
    schedule = FlowSchedule()
    student = Student(PointFlow(schedule), (999,))
    method = method_of(student, MomentMatchingOptions(guidance=None, from_zero=0.5))
    denoiser = student.denoiser
    assert isinstance(denoiser, PointFlow)
    method.loss(student, batch_of(400, 0.1), 0.0, torch.Generator().manual_seed(0))
    for starts in denoiser.starts:
        groups = starts.view(100, 4)
        assert torch.equal(groups, groups[:, :1].expand(100, 4))
        assert 0.35 < float((groups == 0).float().mean()) < 0.65
        assert len(groups[:, 0].unique()) > 30


def test_cost_counts_the_teacher() -> None:
    student = Student(PointFlow(FlowSchedule()), (999,))
    costs = [
        method_of(student, MomentMatchingOptions(guidance=guidance)).cost(0.0)
        for guidance in (None, 1.0, 2.0)
    ]
    assert costs == [4, 5, 6]


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="groups of 1, 0.5 of them"):
        MomentMatchingOptions(group=1)
    with pytest.raises(UserError, match="a positive decrement"):
        MomentMatchingOptions(decrement=0.0)
    with pytest.raises(UserError, match="batch of 8 cannot be divided into groups of 3"):
        method_of(Student(PointFlow(FlowSchedule()), (999,)), MomentMatchingOptions(group=3))
    boundary = Student(PointFlow(FlowSchedule()), (999,), timestep_scaling=10.0)
    with pytest.raises(UserError, match="moment matching has boundary conditions of its own"):
        method_of(boundary, MomentMatchingOptions())
