"""The contract's arithmetic: one prediction seen four ways, and guidance as a wrapper."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distill.core.noise import NoiseSchedule, PredictionType
from distill.core.score import Guided, Prediction

T = torch.tensor([3, 500, 990])


def noisy(seed: int = 0) -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_prediction_survives_every_parameterisation(kind: PredictionType, schedule: NoiseSchedule) -> None:
    x_t, eps = noisy(0), noisy(1)
    first = Prediction.of(eps, x_t, T, schedule, "epsilon")
    again = Prediction.of(
        {"epsilon": first.eps, "v_prediction": first.v, "sample": first.x0}[kind], x_t, T, schedule, kind
    )
    for name, one, two in (
        ("x0", again.x0, first.x0),
        ("eps", again.eps, first.eps),
        ("v", again.v, first.v),
    ):
        torch.testing.assert_close(
            one, two, atol=1e-5, rtol=1e-6, msg=name
        )  # the schedule's alpha and sigma are float32
    torch.testing.assert_close(first.alpha * first.x0 + first.sigma * first.eps, x_t)


def test_score_is_the_gradient_of_the_log_density(gaussian: Any, schedule: NoiseSchedule) -> None:
    x_t = noisy().requires_grad_()
    mean, std = 0.7, 0.5
    variance = schedule.alpha(T).double() ** 2 * std**2 + schedule.sigma(T).double() ** 2
    log_density = -0.5 * (x_t - schedule.alpha(T).double() * mean).square() / variance
    (expected,) = torch.autograd.grad(log_density.sum(), x_t)
    told = gaussian(std).predict(x_t.detach(), T, torch.full((3, 1, 1), mean, dtype=torch.float64)).score
    torch.testing.assert_close(told, expected, atol=1e-5, rtol=1e-5)


def test_guided_equals_two_calls(gaussian: Any) -> None:
    model, x_t = gaussian(0.5), noisy().float()
    empty, bound = torch.zeros(1, 1, 1), torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    free, told = model.predict(x_t, T, empty.expand(3, 1, 1)), model.predict(x_t, T, bound)
    model.asked.clear()
    for scale in (0.0, 3.0, 7.5):
        got = Guided(model, empty, scale).predict(x_t, T, bound)
        torch.testing.assert_close(got.eps, free.eps + scale * (told.eps - free.eps))
        torch.testing.assert_close(got.x0, (x_t - got.sigma * got.eps) / got.alpha, atol=1e-4, rtol=1e-4)
    assert [len(condition) for condition in model.asked] == [6, 6, 6]  # one batched call each


def test_scale_one_never_asks_the_unconditional(gaussian: Any) -> None:
    model, x_t, bound = gaussian(0.5), noisy().float(), torch.ones(3, 1, 1)
    got = Guided(model, torch.full((1, 1, 1), 9.0), 1.0).predict(x_t, T, bound)
    torch.testing.assert_close(got.eps, gaussian(0.5).predict(x_t, T, bound).eps)
    assert len(model.asked) == 1 and model.asked[0].equal(bound)


def test_chunk_parts_all_fields_alike(gaussian: Any) -> None:
    whole = gaussian(1.0).predict(torch.cat([noisy(0), noisy(1)]), T.repeat(2), torch.zeros(6, 1, 1))
    second = whole.chunk(2)[1]
    for part, full in (
        (second.x0, whole.x0),
        (second.eps, whole.eps),
        (second.v, whole.v),
        (second.alpha, whole.alpha),
    ):
        assert part.equal(full[3:])
