"""The schedule agrees with diffusers; every parameterisation converts to every other."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from distill.core.noise import (
    NoiseSchedule,
    PredictionType,
    clean_and_noise,
    from_flow,
    from_variance_exploding,
    to_flow,
    to_variance_exploding,
)
from distill.core.score import Prediction
from distill.runtime.errors import UserError

KINDS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
TIMES = torch.tensor([0, 1, 250, 500, 998, 999])


def randn(*seeds: int) -> list[Tensor]:
    shape = (len(TIMES), 4, 3, 3)
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]


@pytest.mark.parametrize("zero", [False, True])
def test_agrees_with_diffusers(zero: bool) -> None:
    theirs = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=zero)
    ours = NoiseSchedule(theirs.alphas_cumprod)
    clean, noise = (value.float() for value in randn(0, 1))
    assert ours.num_train_timesteps == 1000
    torch.testing.assert_close(
        ours.add_noise(clean, noise, TIMES), theirs.add_noise(clean, noise, TIMES), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        ours.velocity(clean, noise, TIMES), theirs.get_velocity(clean, noise, TIMES), atol=1e-5, rtol=1e-5
    )


def test_alpha_is_the_square_root_of_the_product() -> None:
    schedule = NoiseSchedule(torch.tensor([0.81, 0.36, 0.0]))
    t = torch.tensor([2, 0, 1])
    assert schedule.alpha(t).shape == (3, 1, 1, 1)
    torch.testing.assert_close(schedule.alpha(t).flatten(), torch.tensor([0.0, 0.9, 0.6]))
    torch.testing.assert_close(schedule.sigma(t).flatten(), torch.tensor([1.0, 0.19**0.5, 0.8]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameterisation_recovers_clean_and_noise(kind: PredictionType) -> None:
    clean, noise = randn(0, 1)
    angle = torch.linspace(0.01, 1.55, len(TIMES), dtype=torch.float64)[:, None, None, None]
    alpha, sigma = angle.cos(), angle.sin()
    x_t = alpha * clean + sigma * noise
    output = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}[kind]
    got = clean_and_noise(output, x_t, alpha, sigma, kind)
    torch.testing.assert_close(got[0], clean, atol=1e-11, rtol=0)
    torch.testing.assert_close(got[1], noise, atol=1e-11, rtol=0)


def test_the_last_level_of_zero_terminal_snr_is_finite_from_v() -> None:
    schedule = NoiseSchedule(torch.tensor([0.9, 0.4, 0.0]))
    t = torch.tensor([2])
    v, x_t = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    clean, noise = clean_and_noise(v, x_t, schedule.alpha(t), schedule.sigma(t), "v_prediction")
    torch.testing.assert_close(clean, -v)
    torch.testing.assert_close(noise, x_t)


def test_half_precision_becomes_float32() -> None:
    half = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    for part in clean_and_noise(half, half, torch.tensor(0.6), torch.tensor(0.8), "v_prediction"):
        assert part.dtype == torch.float32


@pytest.mark.parametrize("product", [[0.1, 0.5], [0.5, 0.5], [0.5], [1.2, 0.5], [0.5, -0.1], [[0.9, 0.5]]])
def test_an_invalid_schedule_raises(product: list) -> None:
    with pytest.raises(UserError, match="decreasing"):
        NoiseSchedule(torch.tensor(product))


def test_an_unknown_prediction_type_raises() -> None:
    one = torch.ones(1)
    with pytest.raises(UserError, match="'flow'.*epsilon"):
        clean_and_noise(one, one, one, one, "flow")  # type: ignore[arg-type]


def test_the_three_forms_of_diffusion_round_trip(schedule: NoiseSchedule) -> None:
    """Variance preserving, exploding and flow: each has the same x0 and eps, and converts back."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0, 200, 600, 999])
    alpha, sigma = schedule.alpha(t).double(), schedule.sigma(t).double()
    x_t = alpha * x0 + sigma * eps
    exploding, level = to_variance_exploding(x_t, alpha, sigma)
    torch.testing.assert_close(exploding, x0 + level * eps)
    straight, time = to_flow(x_t, alpha, sigma)
    torch.testing.assert_close(straight, (1 - time) * x0 + time * eps)
    for back in (from_variance_exploding(exploding, level), from_flow(straight, time)):
        torch.testing.assert_close(
            back[0], x_t, atol=1e-6, rtol=1e-6
        )  # alpha and sigma of the schedule are float32
        torch.testing.assert_close(back[1], alpha, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(back[2], sigma, atol=1e-6, rtol=1e-6)
    assert schedule.sigma_to_t(level.flatten()).equal(t)
    assert Prediction(x0, eps, alpha, sigma).flow.equal(eps - x0)


@pytest.mark.parametrize("prediction_type", KINDS)
def test_the_training_target_inverts_the_conversion(
    prediction_type: PredictionType, schedule: NoiseSchedule
) -> None:
    clean, noise = randn(0, 1)
    alpha, sigma = schedule.alpha(TIMES).double(), schedule.sigma(TIMES).double()
    target = schedule.target(clean, noise, TIMES, prediction_type)
    x0, eps = clean_and_noise(target, alpha * clean + sigma * noise, alpha, sigma, prediction_type)
    torch.testing.assert_close(x0, clean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(eps, noise, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="'flow' is unknown"):
        schedule.target(clean, noise, TIMES, "flow")  # type: ignore[arg-type]


def test_the_weight_of_x0_in_the_posterior_is_that_of_bayes() -> None:
    """q(x_{t-1} | x_t, x0) from the two normal densities that it is the product of."""
    schedule = NoiseSchedule(DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod)
    t = torch.tensor([1, 300, 998])
    signal, before = (schedule.alpha(time).flatten().double() ** 2 for time in (t, t - 1))
    step = signal / before  # alpha_t of Ho et al.: x_t = sqrt(step) x_{t-1} + sqrt(1 - step) noise
    precision = 1 / (1 - before) + step / (1 - step)
    torch.testing.assert_close(
        schedule.posterior_weight(t).double(), before.sqrt() / (1 - before) / precision, rtol=1e-3, atol=1e-6
    )
    assert float(schedule.posterior_weight(torch.tensor([0]))) == pytest.approx(1)
