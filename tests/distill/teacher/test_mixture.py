"""The oracle against arithmetic: automatic differentiation, quadrature, samples, diffusers' own solvers."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from distill.core.noise import NoiseSchedule
from distill.core.sampling import sample_ddpm, sample_flow, sample_ode
from distill.core.score import Guided
from distill.runtime.errors import UserError
from distill.teacher.mixture import Mixture, MixtureTeacher, ring

T = torch.tensor([0, 100, 500, 900, 999])


def line(stds: tuple[float, float] = (0.3, 0.1)) -> Mixture:
    """Two unequal components on a line."""
    shaped = [
        torch.tensor(values, dtype=torch.float64)[:, None, None, None] for values in ((-1.0, 0.5), stds)
    ]
    return Mixture(shaped[0], shaped[1], torch.tensor([0.7, 0.3], dtype=torch.float64), ("left", "right"))


def noisy(count: int, shape: tuple[int, ...] = (2, 1, 1), seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("label", ["", "c1"])
def test_score_is_the_gradient_of_the_log_density(label: str, schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(ring(), schedule)
    x_t, condition = noisy(5).requires_grad_(), teacher.encode_text([label] * 5)
    (expected,) = torch.autograd.grad(teacher.log_density(x_t, T, condition).sum(), x_t)
    torch.testing.assert_close(
        teacher.predict(x_t.detach(), T, condition).score, expected, atol=1e-6, rtol=1e-5
    )


def test_density_and_posterior_mean_by_quadrature(schedule: NoiseSchedule) -> None:
    """p_t and E[x0 | x_t] by summing over a fine grid of x0, without a formula of the mixture's own noise."""
    mixture, x, t = line(), 0.2, torch.tensor([400])
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    grid = torch.linspace(-4, 4, 20_001, dtype=torch.float64)
    prior = sum(
        w * torch.exp(-0.5 * ((grid - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        for w, m, s in ((0.7, -1.0, 0.3), (0.3, 0.5, 0.1))
    )
    joint = prior * torch.exp(-0.5 * ((x - alpha * grid) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    density = torch.trapezoid(joint, grid)
    teacher = MixtureTeacher(mixture, schedule)
    at, condition = torch.full((1, 1, 1, 1), x, dtype=torch.float64), teacher.encode_text([""])
    assert float(teacher.log_density(at, t, condition).exp()) == pytest.approx(float(density), rel=1e-6)
    told = teacher.predict(at, t, condition)
    assert float(told.x0) == pytest.approx(float(torch.trapezoid(joint * grid, grid) / density), rel=1e-6)
    assert float(told.alpha * told.x0 + told.sigma * told.eps) == pytest.approx(x, abs=1e-6)


def test_exact_at_the_last_level_of_zero_terminal_snr() -> None:
    schedule = NoiseSchedule(torch.linspace(0.999, 0.0, 1000))
    teacher, x_t = MixtureTeacher(ring(), schedule), noisy(3)
    told = teacher.predict(x_t, torch.full((3,), 999), teacher.encode_text(["c0"] * 3))
    torch.testing.assert_close(told.eps, x_t)
    torch.testing.assert_close(
        told.x0, torch.zeros_like(x_t), atol=1e-9, rtol=0
    )  # the mean of a class of opposite modes


def test_classes_choose_components(schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(line(), schedule)
    assert teacher.encode_text(["", "left", "right"])[:, 0].tolist() == [[0.7, 0.3], [1, 0], [0, 1]]
    samples = teacher.sample(teacher.encode_text(["right"] * 20_000), torch.Generator().manual_seed(0))
    assert float(samples.mean()) == pytest.approx(0.5, abs=4 * 0.1 / 20_000**0.5)
    assert float(samples.std()) == pytest.approx(0.1, rel=0.03)
    with pytest.raises(UserError, match="no class 'middle': it has left, right"):
        teacher.encode_text(["middle"])


def test_guidance_is_the_mix_of_exact_scores(schedule: NoiseSchedule) -> None:
    teacher, x_t = MixtureTeacher(ring(), schedule), noisy(5)
    bound, free = teacher.encode_text(["c2"] * 5), teacher.encode_text([""])
    told = Guided(teacher, free, 3.0).predict(x_t, T, bound)
    parts = [teacher.predict(x_t, T, condition).eps for condition in (free.expand_as(bound), bound)]
    torch.testing.assert_close(told.eps, parts[0] + 3 * (parts[1] - parts[0]))


def betas() -> dict[str, Any]:
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }


def drawn(solver: str, teacher: MixtureTeacher, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, *teacher.latent_shape, generator=generator, dtype=torch.float64)
    condition = teacher.encode_text([""] * count)
    if solver == "ddpm":
        return sample_ddpm(teacher, DDPMScheduler(**betas()), condition, noise, 200, generator)
    if solver == "ddim":
        return sample_ode(teacher, DDIMScheduler(**betas()), condition, noise, 100)
    if solver == "flow":
        return sample_flow(teacher, condition, noise, 60)
    given = {key: value for key, value in betas().items() if key != "clip_sample"}
    stock = (
        DPMSolverMultistepScheduler(**given) if solver == "dpm-solver" else EulerDiscreteScheduler(**given)
    )
    return sample_ode(teacher, stock, condition, noise, 40 if solver == "dpm-solver" else 100)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm-solver", "euler", "flow"])
def test_stock_solvers_reach_the_mixture(solver: str, schedule: NoiseSchedule) -> None:
    """Mean, variance and the share of each component of 4,000 samples: Euler carries the exploding SDE, the last one flow time."""
    mixture, count = line((0.3, 0.3)), 4000
    samples = drawn(solver, MixtureTeacher(mixture, schedule), count).flatten()
    mean = 0.7 * -1.0 + 0.3 * 0.5
    variance = 0.09 + 0.7 * (-1.0 - mean) ** 2 + 0.3 * (0.5 - mean) ** 2
    assert float(samples.mean()) == pytest.approx(
        mean, abs=0.06
    )  # the schedule's last level is not quite noise
    assert float(samples.var()) == pytest.approx(variance, rel=0.08)
    assert float((samples > -0.25).double().mean()) == pytest.approx(0.3, abs=0.04)


def test_refuses_what_is_no_mixture() -> None:
    good = line()
    with pytest.raises(UserError, match="K labels"):
        Mixture(good.means, good.stds, good.weights, ("one",))
    with pytest.raises(UserError, match="sum to 1"):
        Mixture(good.means, good.stds, good.weights * 2, good.labels)
