"""Sampling the closed-form Gaussian: each sampler must reach its distribution."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule
from distill.core.samplers import sample_by_name
from distill.core.sampling import Formulation, sample_ddpm, sample_heun, sample_ode
from distill.core.score import Prediction
from distill.runtime.errors import UserError

SHARED: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
MEAN, STD = 0.8, 0.5


def mean(count: int) -> Conditioning:
    return Conditioning(torch.full((count, 1, 1), MEAN))


def randn(count: int, side: int) -> Tensor:
    return torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddim_follows_the_probability_flow(kind: str, gaussian: Any) -> None:
    scheduler = DDIMScheduler(
        prediction_type=kind, timestep_spacing="trailing", set_alpha_to_one=True, **SHARED
    )
    noise = randn(64, 2)
    got = sample_ode(gaussian(STD), scheduler, mean(64), noise, 100)
    torch.testing.assert_close(
        got, MEAN + STD * noise, atol=0.1, rtol=0
    )  # a Gaussian's flow keeps quantiles; the start has alpha 0.07
    assert scheduler.num_inference_steps is None  # the caller's scheduler is as it was


def test_ddim_equals_its_equation(gaussian: Any, schedule: NoiseSchedule) -> None:
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True, **SHARED
    )
    noise, conditioning = randn(2, 3), mean(2)
    calls: list[tuple[int, Tensor, Prediction]] = []
    got = sample_ode(gaussian(STD), scheduler, conditioning, noise, 2, lambda *call: calls.append(call))
    model, x, inputs = gaussian(STD), noise, []
    for t, alpha, sigma in (
        (999, schedule.alpha(torch.tensor([499])), schedule.sigma(torch.tensor([499]))),
        (499, 1.0, 0.0),
    ):
        inputs.append(x)
        prediction = model.predict(x, torch.full((2,), t), conditioning)
        x = alpha * prediction.x0 + sigma * prediction.eps
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-4)
    assert [step for step, _, _ in calls] == [0, 1]
    for (_, x_t, _), expected in zip(calls, inputs, strict=True):
        torch.testing.assert_close(x_t, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(calls[-1][2].x0, x, atol=1e-4, rtol=1e-4)


def test_ddpm_samples_the_distribution(gaussian: Any) -> None:
    scheduler = DDPMScheduler(prediction_type="epsilon", timestep_spacing="trailing", **SHARED)
    noise, conditioning = randn(4000, 1), mean(4000)
    one, two, three = (
        sample_ddpm(gaussian(STD), scheduler, conditioning, noise, 100, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert abs(float(one.mean()) - MEAN) < 0.04 and abs(float(one.std()) - STD) < 0.03
    assert one.equal(two) and not one.equal(three)


@pytest.mark.parametrize("formulation", ["vp", "ve", "flow"])
def test_heun_follows_the_probability_flow_in_every_formulation(
    formulation: Formulation, gaussian: Any
) -> None:
    """The map of a Gaussian's probability flow is affine and the same in all variables: x0 = m + s eps."""
    got = sample_heun(gaussian(STD), mean(64), randn(64, 2), 60, formulation)
    torch.testing.assert_close(got, MEAN + STD * randn(64, 2), atol=0.1, rtol=0)


@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_the_schedule_has_raise(steps: int, gaussian: Any) -> None:
    with pytest.raises(UserError, match=f"steps is {steps}: expected 1 to 1000"):
        sample_ode(gaussian(STD), DDIMScheduler(**SHARED), mean(1), randn(1, 1), steps)


def test_ddpm_without_its_noise_follows_the_means_and_collapses(
    gaussian: Any, schedule: NoiseSchedule
) -> None:
    """From the same noise it makes the same image, near the mean: every step narrows the distribution."""
    scheduler, conditioning, noise = DDIMScheduler(**SHARED), mean(64), randn(64, 2)
    arguments = gaussian(STD), scheduler, conditioning, noise, 100
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    first, second = (sample_by_name("ddpm_mean", *arguments, seed) for seed in seeds)
    assert torch.equal(first, second)
    assert float((first.mean() - MEAN).abs()) < 0.05 and float(first.std()) < 0.3 * STD
    noisy = sample_by_name("ddpm", *arguments, seeds[0])
    assert float((noisy.std() - STD).abs()) < 0.1
    assert torch.equal(
        sample_by_name("ddim", *arguments, seeds[0]),
        sample_ode(*arguments),  # type: ignore[arg-type]
    )


def test_each_step_without_noise_is_the_posterior_mean(gaussian: Any, schedule: NoiseSchedule) -> None:
    """Ho et al. 2020, eq. 7, of a step from 999 to 499."""
    states: list[Tensor] = []
    scheduler = DDIMScheduler(timestep_spacing="trailing", **SHARED)
    model, noise = gaussian(STD), randn(2, 2)
    generator = torch.Generator()
    sample_by_name(
        "ddpm_mean", model, scheduler, mean(2), noise, 2, generator, lambda step, x, _: states.append(x)
    )
    x0 = model.predict(noise, torch.full((2,), 999), mean(2)).x0
    product = schedule.alpha(torch.tensor([999, 499])).flatten().square()
    ratio = product[0] / product[1]
    first = product[1].sqrt() * (1 - ratio) / (1 - product[0])
    second = ratio.sqrt() * (1 - product[1]) / (1 - product[0])
    torch.testing.assert_close(states[1], first * x0 + second * noise, atol=1e-4, rtol=1e-4)
