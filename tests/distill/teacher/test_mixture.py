"""The mixture against arithmetic: automatic differentiation, quadrature, samples, diffusers' own solvers."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from distill.core.noise import NoiseSchedule
from distill.core.sampling import Formulation, sample_ddpm, sample_heun, sample_ode
from distill.core.score import Guided
from distill.runtime.errors import UserError
from distill.teacher.mixture import Mixture, MixtureTeacher, ring

T = torch.tensor([0, 100, 500, 900, 999])
FORMULATIONS: dict[str, Formulation] = {"vp": "vp", "ve": "ve", "flow": "flow"}


def line(stds: tuple[float, float] = (0.3, 0.1)) -> Mixture:
    """Two unequal components on a line."""
    points = [
        torch.tensor(values, dtype=torch.float64)[:, None, None, None] for values in ((-1.0, 0.5), stds)
    ]
    return Mixture(points[0], points[1], torch.tensor([0.7, 0.3], dtype=torch.float64), ("left", "right"))


def noisy(count: int, shape: tuple[int, ...] = (2, 1, 1), seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("label", ["", "c1"])
def test_score_is_the_gradient_of_the_log_density(label: str, schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(ring(), schedule)
    x_t, conditioning = noisy(5).requires_grad_(), teacher.encode_text([label] * 5)
    (expected,) = torch.autograd.grad(teacher.log_density(x_t, T, conditioning).sum(), x_t)
    torch.testing.assert_close(
        teacher.predict(x_t.detach(), T, conditioning).score, expected, atol=1e-6, rtol=1e-5
    )


def test_density_and_posterior_mean_by_quadrature(schedule: NoiseSchedule) -> None:
    """p_t and E[x0 | x_t] by integration over a fine grid of x0, without the mixture's own formulas."""
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
    x_t, conditioning = torch.full((1, 1, 1, 1), x, dtype=torch.float64), teacher.encode_text([""])
    assert float(teacher.log_density(x_t, t, conditioning).exp()) == pytest.approx(float(density), rel=1e-6)
    prediction = teacher.predict(x_t, t, conditioning)
    expected = float(torch.trapezoid(joint * grid, grid) / density)
    assert float(prediction.x0) == pytest.approx(expected, rel=1e-6)
    assert float(prediction.x_t) == pytest.approx(x, abs=1e-6)


def test_exact_at_the_last_level_of_zero_terminal_snr() -> None:
    schedule = NoiseSchedule(torch.linspace(0.999, 0.0, 1000))
    teacher, x_t = MixtureTeacher(ring(), schedule), noisy(3)
    prediction = teacher.predict(x_t, torch.full((3,), 999), teacher.encode_text(["c0"] * 3))
    torch.testing.assert_close(prediction.eps, x_t)
    # the mean of a class of two opposite modes is the origin
    torch.testing.assert_close(prediction.x0, torch.zeros_like(x_t), atol=1e-9, rtol=0)


def test_classes_select_components(schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(line(), schedule)
    assert teacher.encode_text(["", "left", "right"]).embedding[:, 0].tolist() == [[0.7, 0.3], [1, 0], [0, 1]]
    samples = teacher.sample(teacher.encode_text(["right"] * 20_000), torch.Generator().manual_seed(0))
    assert float(samples.mean()) == pytest.approx(0.5, abs=4 * 0.1 / 20_000**0.5)
    assert float(samples.std()) == pytest.approx(0.1, rel=0.03)
    with pytest.raises(UserError, match="no class 'middle': it has left, right"):
        teacher.encode_text(["middle"])


def test_guidance_is_the_mix_of_exact_scores(schedule: NoiseSchedule) -> None:
    teacher, x_t = MixtureTeacher(ring(), schedule), noisy(5)
    conditioning, uncond = teacher.encode_text(["c2"] * 5), teacher.encode_text([""])
    guided = Guided(teacher, uncond, 3.0).predict(x_t, T, conditioning)
    eps_uncond, eps_cond = (teacher.predict(x_t, T, c).eps for c in (uncond.expand(5), conditioning))
    torch.testing.assert_close(guided.eps, eps_uncond + 3 * (eps_cond - eps_uncond))


def betas() -> dict[str, Any]:
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }


def sample_with(solver: str, teacher: MixtureTeacher, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, *teacher.latent_shape, generator=generator, dtype=torch.float64)
    conditioning = teacher.encode_text([""] * count)
    if solver == "ddpm":
        return sample_ddpm(teacher, DDPMScheduler(**betas()), conditioning, noise, 200, generator)
    if solver == "ddim":
        return sample_ode(teacher, DDIMScheduler(**betas()), conditioning, noise, 100)
    if solver in FORMULATIONS:
        return sample_heun(teacher, conditioning, noise, 60, FORMULATIONS[solver])
    options = {key: value for key, value in betas().items() if key != "clip_sample"}
    solvers = {"dpm-solver": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}
    stock = solvers[solver](**options)
    return sample_ode(teacher, stock, conditioning, noise, 40 if solver == "dpm-solver" else 100)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm-solver", "euler", *FORMULATIONS])
def test_stock_solvers_reach_the_mixture(solver: str, schedule: NoiseSchedule) -> None:
    """Mean, variance and component fractions; the last three are one ODE in three variables."""
    mixture, count = line((0.3, 0.3)), 4000
    samples = sample_with(solver, MixtureTeacher(mixture, schedule), count).flatten()
    mean = 0.7 * -1.0 + 0.3 * 0.5
    variance = 0.09 + 0.7 * (-1.0 - mean) ** 2 + 0.3 * (0.5 - mean) ** 2
    assert float(samples.mean()) == pytest.approx(
        mean, abs=0.06
    )  # the schedule's last level is not quite noise
    assert float(samples.var()) == pytest.approx(variance, rel=0.08)
    assert float((samples > -0.25).double().mean()) == pytest.approx(0.3, abs=0.04)


def test_an_invalid_mixture_raises() -> None:
    good = line()
    with pytest.raises(UserError, match="K labels"):
        Mixture(good.means, good.stds, good.weights, ("one",))
    with pytest.raises(UserError, match="sum to 1"):
        Mixture(good.means, good.stds, good.weights * 2, good.labels)
