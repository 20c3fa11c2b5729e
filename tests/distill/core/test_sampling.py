"""Sampling the closed-form Gaussian: each sampler must arrive at its distribution."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from distill.core.noise import NoiseSchedule
from distill.core.sampling import sample_ddpm, sample_ode
from distill.core.score import Prediction

SHARED: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
MEAN, STD = 0.8, 0.5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddim_follows_the_probability_flow(kind: str, gaussian: Any) -> None:
    scheduler = DDIMScheduler(
        prediction_type=kind, timestep_spacing="trailing", set_alpha_to_one=True, **SHARED
    )
    noise = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    got = sample_ode(gaussian(STD), scheduler, torch.full((64, 1, 1), MEAN), noise, 100)
    torch.testing.assert_close(
        got, MEAN + STD * noise, atol=0.1, rtol=0
    )  # a Gaussian's flow keeps quantiles; the start has alpha 0.07
    assert scheduler.num_inference_steps is None  # the caller's scheduler is as it was


def test_ddim_equals_its_equation(gaussian: Any, schedule: NoiseSchedule) -> None:
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True, **SHARED
    )
    noise, condition = (
        torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0)),
        torch.full((2, 1, 1), MEAN),
    )
    seen: list[tuple[int, Prediction]] = []
    got = sample_ode(
        gaussian(STD), scheduler, condition, noise, 2, lambda number, told: seen.append((number, told))
    )
    model, x = gaussian(STD), noise
    for t, alpha, sigma in (
        (999, schedule.alpha(torch.tensor([499])), schedule.sigma(torch.tensor([499]))),
        (499, 1.0, 0.0),
    ):
        told = model.predict(x, torch.full((2,), t), condition)
        x = alpha * told.x0 + sigma * told.eps
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-4)
    assert [number for number, _ in seen] == [0, 1]
    torch.testing.assert_close(seen[-1][1].x0, x, atol=1e-4, rtol=1e-4)


def test_ddpm_draws_the_distribution(gaussian: Any) -> None:
    scheduler = DDPMScheduler(prediction_type="epsilon", timestep_spacing="trailing", **SHARED)
    noise, condition = (
        torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0)),
        torch.full((4000, 1, 1), MEAN),
    )
    one, two, three = (
        sample_ddpm(gaussian(STD), scheduler, condition, noise, 100, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert abs(float(one.mean()) - MEAN) < 0.04 and abs(float(one.std()) - STD) < 0.03
    assert one.equal(two) and not one.equal(three)
