"""The contract's arithmetic: a prediction in every parameterisation, and guidance as a wrapper."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule, PredictionType
from distill.core.score import Guided, Prediction, ScoreModel, guidance_nfe

T = torch.tensor([3, 500, 990])


def noisy(seed: int = 0) -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_prediction_survives_every_parameterisation(kind: PredictionType, schedule: NoiseSchedule) -> None:
    x_t, eps = noisy(0), noisy(1)
    first = Prediction.from_output(eps, x_t, T, schedule, "epsilon")
    again = Prediction.from_output(
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
    conditioning = Conditioning(torch.full((3, 1, 1), mean, dtype=torch.float64))
    score = gaussian(std).predict(x_t.detach(), T, conditioning).score
    torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-5)


def test_guided_equals_two_calls(gaussian: Any) -> None:
    model, x_t = gaussian(0.5), noisy().float()
    uncond = Conditioning(torch.zeros(1, 1, 1))
    conditioning = Conditioning(torch.tensor([1.0, 2.0, 3.0])[:, None, None])
    eps_uncond, eps_cond = (model.predict(x_t, T, c).eps for c in (uncond.expand(3), conditioning))
    model.queries.clear()
    for scale in (0.0, 3.0, 7.5):
        got = Guided(model, uncond, scale).predict(x_t, T, conditioning)
        torch.testing.assert_close(got.eps, eps_uncond + scale * (eps_cond - eps_uncond))
        torch.testing.assert_close(got.x0, (x_t - got.sigma * got.eps) / got.alpha, atol=1e-4, rtol=1e-4)
    assert [len(embedding) for embedding in model.queries] == [3, 6, 6]  # one batched call each
    assert not model.queries[0].any() and [guidance_nfe(scale) for scale in (0, 1.0, 3.0)] == [1, 1, 2]


def test_guidance_keeps_cameras_and_groups(gaussian: Any) -> None:
    """The unconditional row has its own text, and what it lacks from the conditioning."""
    inner, batches = gaussian(0.5), []

    class Recorder(ScoreModel):
        schedule = inner.schedule

        def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
            batches.append(conditioning)
            return inner.predict(x_t, t, conditioning)

    poses, pooled = torch.rand(4, 5), torch.ones(4, 2)
    conditioning = Conditioning(torch.ones(4, 1, 1), {"pose": poses, "pooled": pooled}, views=2)
    uncond = Conditioning(torch.zeros(1, 1, 1), {"pooled": torch.zeros(1, 2)})
    x_t, t = torch.randn(4, 2, 4, 4), torch.tensor([3, 3, 500, 500])
    Guided(Recorder(), uncond, 3.0).predict(x_t, t, conditioning)
    (batch,) = batches
    assert batch.views == 2 and torch.equal(batch.extras["pose"], poses.repeat(2, 1))
    assert batch.extras["pooled"][:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert batch.embedding.flatten().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_scale_one_does_not_evaluate_the_unconditional(gaussian: Any) -> None:
    model, x_t, conditioning = gaussian(0.5), noisy().float(), Conditioning(torch.ones(3, 1, 1))
    uncond = Conditioning(torch.full((1, 1, 1), 9.0))
    got = Guided(model, uncond, 1.0).predict(x_t, T, conditioning)
    torch.testing.assert_close(got.eps, gaussian(0.5).predict(x_t, T, conditioning).eps)
    assert len(model.queries) == 1 and model.queries[0].equal(conditioning.embedding)


def test_chunk_splits_every_field(gaussian: Any) -> None:
    x_t = torch.cat([noisy(0), noisy(1)])
    whole = gaussian(1.0).predict(x_t, T.repeat(2), Conditioning(torch.zeros(6, 1, 1)))
    second = whole.chunk(2)[1]
    for part, full in (
        (second.x0, whole.x0),
        (second.eps, whole.eps),
        (second.v, whole.v),
        (second.alpha, whole.alpha),
    ):
        assert part.equal(full[3:])
