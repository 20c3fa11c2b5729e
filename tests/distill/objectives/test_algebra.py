"""The algebra of objectives on a teacher whose scores are known in closed form."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule
from distill.objectives.algebra import DistillationOutput, ScoreDistillation, surrogate_loss, time_weight
from distill.objectives.options import (
    LinearSchedule,
    NoiseSource,
    ObjectiveOptions,
    Term,
    TimestepSampler,
    Weight,
)
from distill.objectives.prompts import PromptConditionings, encode_prompts
from distill.runtime.errors import UserError
from distill.teacher.mixture import MixtureTeacher, ring

WEIGHTS: tuple[Weight, ...] = ("sigma_squared", "one", "alpha_sigma_squared", "sigma_over_alpha")


def fixed_time(fraction: float) -> TimestepSampler:
    return TimestepSampler(fraction, (fraction, fraction))


def means(
    conditional: float, unconditional: float, count: int, negative: float | None = None
) -> PromptConditionings:
    values = {"unconditional": unconditional} | ({} if negative is None else {"negative": negative})
    shared = {name: Conditioning(torch.full((1, 1, 1), value)) for name, value in values.items()}
    own = Conditioning(torch.full((count, 1, 1), conditional))
    return PromptConditionings({"conditional": own, **shared})


def teacher(prompt: str = "conditional", coefficient: float | LinearSchedule = 1.0) -> Term:
    return Term("teacher", coefficient, prompt)


def sds(
    scale: float = 1.0, weight: Weight = "sigma_squared", fraction: float = 0.5, clip: float = 0.0
) -> ObjectiveOptions:
    return ObjectiveOptions(
        (Term("teacher", guidance=scale), Term("noise", -1.0)), weight, fixed_time(fraction), clip=clip
    )


def distill_step(
    model: Any, options: ObjectiveOptions, latents: Tensor, conditionings: PromptConditionings, seed: int = 0
) -> DistillationOutput:
    return ScoreDistillation(model, options)(latents, conditionings, 0.0, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_mean_sds_gradient_is_its_closed_form(
    weight: Weight, fraction: float, gaussian: Any, schedule: NoiseSchedule
) -> None:
    count, std, mean, z = 20_000, 0.5, 0.3, 1.1
    result = distill_step(
        gaussian(std), sds(1.0, weight, fraction), torch.full((count, 1, 1, 1), z), means(mean, 0, count)
    )
    alpha, sigma = schedule.alpha(result.t[:1]).double(), schedule.sigma(result.t[:1]).double()
    factor = {
        "sigma_squared": sigma**2,
        "one": 1.0,
        "alpha_sigma_squared": alpha * sigma**2,
        "sigma_over_alpha": sigma / alpha,
    }[weight]
    expected = float(factor * sigma * alpha * (z - mean) / (alpha**2 * std**2 + sigma**2))
    error = float(result.gradient.std()) / count**0.5
    assert abs(float(result.gradient.mean()) - expected) < 4 * error
    assert expected > 20 * error  # the comparison above can tell a wrong factor


@pytest.mark.parametrize(
    "options", [sds(2.0), ObjectiveOptions((teacher(),), noise=NoiseSource("inversion"))]
)
def test_a_group_of_views_has_one_noise_level(options: ObjectiveOptions, gaussian: Any) -> None:
    options, latents = replace(options, time=TimestepSampler()), torch.randn(6, 2, 4, 4)
    prompts = means(0.3, 0.0, 6).apply(lambda value: value.expand(6).grouped(3))
    assert prompts.views == 3 and means(0.3, 0.0, 6).views == 1
    result = distill_step(gaussian(0.5), options, latents, prompts)
    assert result.t.view(2, 3).tolist() == [[t] * 3 for t in result.t[::3].tolist()]
    assert len(result.t.unique()) == 2 and len(result.noise.unique()) == result.noise.numel()


def test_loss_gradient_is_g_over_the_batch(gaussian: Any) -> None:
    latents = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    result = distill_step(gaussian(0.5), sds(7.5), latents, means(1, 0, 3))
    result.loss.backward()
    assert not result.gradient.requires_grad
    torch.testing.assert_close(latents.grad, result.gradient / 3)
    torch.testing.assert_close(result.loss.detach(), 0.5 * result.gradient.square().sum() / 3)


def test_surrogate_loss_by_hand() -> None:
    latents, gradient = torch.zeros(2, 1, 1, 2), torch.tensor([3.0, 4.0, 0.0, 2.0]).view(2, 1, 1, 2)
    assert float(surrogate_loss(latents, gradient)) == pytest.approx((9 + 16 + 4) / 4)


def test_one_call_a_step_and_only_what_is_needed(gaussian: Any) -> None:
    latents, conditionings = torch.zeros(3, 1, 2, 2), means(1, 5, 3, 7)
    model = gaussian(0.5)
    distill_step(model, sds(1.0), latents, conditionings)
    assert len(model.queries) == 1 and model.queries[0].equal(conditionings.by_name["conditional"].embedding)
    every = (
        Term("teacher", guidance=7.5),
        teacher("negative", -0.5),
        teacher("unconditional", 0.2),
        Term("noise", -1.0),
    )
    result = distill_step(model, ObjectiveOptions(every), latents, conditionings)
    assert (
        len(model.queries) == 2 and sorted(model.queries[1].flatten().tolist()) == [1] * 3 + [5] * 3 + [7] * 3
    )
    assert set(result.predictions) == {"conditional", "unconditional", "negative"}
    assert len(result.predictions["negative"].eps) == 3


def test_a_noise_term_alone_needs_no_model(gaussian: Any) -> None:
    model = gaussian(0.5)
    result = distill_step(
        model, ObjectiveOptions((Term("noise", 2.0),), "one"), torch.zeros(2, 1, 2, 2), means(1, 0, 2)
    )
    assert model.queries == [] and float(result.gradient.abs().mean()) > 0.5


def test_g_is_linear_in_the_guidance_scale(gaussian: Any) -> None:
    latents, conditionings = (
        torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)),
        means(1, 0, 3),
    )
    one, three, high = (
        distill_step(gaussian(0.5), sds(scale), latents, conditionings).gradient
        for scale in (1.0, 3.0, 100.0)
    )
    torch.testing.assert_close((high - one) / 99, (three - one) / 2, atol=1e-5, rtol=1e-4)
    assert float((three - one).abs().max()) > 1e-2


def test_each_term_takes_its_own_conditioning(gaussian: Any, schedule: NoiseSchedule) -> None:
    latents, conditionings = torch.zeros(2, 1, 1, 1), means(1.0, 2.0, 2, 4.0)
    outputs = {}
    for name in ("conditional", "unconditional", "negative"):
        outputs[name] = distill_step(
            gaussian(0.5), ObjectiveOptions((teacher(name),), "one", fixed_time(0.4)), latents, conditionings
        )
    t = outputs["negative"].t
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    per_mean = -sigma * alpha / (alpha**2 * 0.25 + sigma**2)
    torch.testing.assert_close(outputs["unconditional"].gradient - outputs["conditional"].gradient, per_mean)
    torch.testing.assert_close(outputs["negative"].gradient - outputs["conditional"].gradient, 3 * per_mean)
    mixed = (teacher("conditional", 3.0), teacher("negative", -0.5))
    got = distill_step(
        gaussian(0.5), ObjectiveOptions(mixed, "one", fixed_time(0.4)), latents, conditionings
    ).gradient
    torch.testing.assert_close(got, 3 * outputs["conditional"].gradient - 0.5 * outputs["negative"].gradient)


def test_a_negative_term_needs_a_negative_prompt(gaussian: Any) -> None:
    with pytest.raises(UserError, match="negative_prompt"):
        distill_step(
            gaussian(0.5), ObjectiveOptions((teacher("negative"),)), torch.zeros(1, 1, 2, 2), means(1, 0, 1)
        )


def test_only_the_prompts_of_the_terms_are_encoded() -> None:
    def encode(prompts: Any) -> Conditioning:
        return Conditioning(torch.tensor([float(len(prompt)) for prompt in prompts])[:, None, None])

    def lengths(conditionings: PromptConditionings) -> dict[str, list[float]]:
        return {name: value.embedding.flatten().tolist() for name, value in conditionings.by_name.items()}

    options = ObjectiveOptions(
        (Term("teacher", guidance=3.0), teacher("negative"), teacher("bad")), prompts={"bad": "{prompt}!"}
    )
    plain = encode_prompts(encode, ["ab", "abc"], ObjectiveOptions((teacher(),)))
    assert lengths(plain) == {"conditional": [2, 3]}
    full = encode_prompts(encode, ["ab", "abc"], options, "abcd")
    expected = {"conditional": [2, 3], "unconditional": [0], "negative": [4], "bad": [3, 4]}
    assert lengths(full) == expected


@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_clip_bounds_each_sample_by_itself(limit: float, gaussian: Any) -> None:
    latents = (
        torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
        * torch.tensor([0.0, 1, 10, 100])[:, None, None, None]
    )
    unclipped = distill_step(gaussian(0.1), sds(), latents, means(0, 0, 4)).gradient
    clipped = distill_step(gaussian(0.1), sds(clip=limit), latents, means(0, 0, 4)).gradient
    size = unclipped.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(clipped.square().mean((1, 2, 3)).sqrt(), size.clamp(max=limit))
    torch.testing.assert_close(
        torch.cosine_similarity(unclipped.flatten(1), clipped.flatten(1)), torch.ones(4)
    )


def test_weights_by_hand() -> None:
    alpha, sigma = torch.full((1, 1, 1, 1), 0.6), torch.full((1, 1, 1, 1), 0.8)
    assert [float(time_weight(name, alpha, sigma)) for name in WEIGHTS] == pytest.approx(
        [0.64, 1, 0.384, 4 / 3]
    )


def test_times_fill_the_range() -> None:
    t = TimestepSampler(0.02, (0.98, 0.98)).sample(20_000, 1000, 0.0, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and (int(t.min()), int(t.max())) == (20, 979)
    assert abs(float(t.float().mean()) - 499.5) < 10 and abs(float(t.float().std()) - 959 / 12**0.5) < 6


def test_the_upper_end_anneals() -> None:
    linear, root = (TimestepSampler(0.02, (0.98, 0.5), kind, until=0.5) for kind in ("linear", "sqrt"))
    assert [linear.upper(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0.98, 0.74, 0.5, 0.5])
    assert [root.upper(p) for p in (0, 0.125, 0.5, 1)] == pytest.approx([0.98, 0.74, 0.5, 0.5])
    assert TimestepSampler(0.02, (0.98, 0.5), "none").upper(1.0) == 0.98
    assert int(linear.sample(5000, 1000, 1.0, torch.Generator().manual_seed(0)).max()) in (499, 500)


def test_a_shared_timestep_is_one_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [
        TimestepSampler(shared_timestep=True).sample(8, 1000, 0.0, generator).unique().tolist()
        for _ in range(4)
    ]
    assert all(len(times) == 1 for times in samples) and len({times[0] for times in samples}) > 1
    assert len(TimestepSampler().sample(8, 1000, 0.0, generator).unique()) > 1


@pytest.mark.parametrize(
    "given", [{"low": -0.1}, {"low": 0.99}, {"high": (0.98, 1.1)}, {"high": (0.98, 0.01)}, {"until": 0.0}]
)
def test_impossible_times_raise(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected 0 <= low"):
        TimestepSampler(**given)


def test_no_terms_raise() -> None:
    with pytest.raises(UserError, match="at least one term"):
        ObjectiveOptions(())


def test_an_infinite_weight_raises(gaussian: Any) -> None:
    """On a schedule with zero terminal SNR, sigma / alpha at the last level divides by 0."""
    model = gaussian(0.5)
    model.schedule = NoiseSchedule(torch.linspace(0.99, 0.0, 1000))
    with pytest.raises(UserError, match="sigma_over_alpha is infinite"):
        ScoreDistillation(model, sds(1.0, "sigma_over_alpha", 1.0))
    ScoreDistillation(model, sds(1.0, "sigma_over_alpha", 0.98))


def test_clamp_bounds_each_element_before_the_norm(gaussian: Any) -> None:
    latents = torch.tensor([0.0, 1.0, 100.0]).view(1, 3, 1, 1).expand(2, 3, 1, 1)
    options = replace(sds(), noise=NoiseSource("fixed"))
    unclamped = distill_step(gaussian(0.1), options, latents, means(0, 0, 2)).gradient
    clamped = distill_step(gaussian(0.1), replace(options, clamp=0.3), latents, means(0, 0, 2)).gradient
    torch.testing.assert_close(clamped, unclamped.clamp(-0.3, 0.3))
    assert float(unclamped.abs().max()) > 0.3
    clipped = distill_step(
        gaussian(0.1), replace(options, clamp=0.3, clip=0.01), latents, means(0, 0, 2)
    ).gradient
    torch.testing.assert_close(clipped.square().mean((1, 2, 3)).sqrt(), torch.full((2,), 0.01))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_jacobian_of_a_gaussian_is_its_closed_form(
    scale: float, gaussian: Any, schedule: NoiseSchedule
) -> None:
    """d eps / d x_t is sigma / (alpha^2 s^2 + sigma^2), at any guidance: both predictions share it."""
    latents, conditionings = torch.randn(3, 2, 4, 4), means(0.5, -0.2, 3)
    for weight in WEIGHTS:
        plain = sds(scale, weight, 0.4)
        first = distill_step(gaussian(0.7), plain, latents, conditionings)
        second = distill_step(gaussian(0.7), replace(plain, jacobian=True), latents, conditionings)
        alpha, sigma = schedule.alpha(first.t), schedule.sigma(first.t)
        factor = alpha * sigma / (alpha.square() * 0.49 + sigma.square())
        torch.testing.assert_close(second.gradient, factor * first.gradient, atol=1e-5, rtol=1e-4)
        assert torch.equal(second.x_t, first.x_t) and not second.x_t.requires_grad
        assert not second.predictions["conditional"].eps.requires_grad


def test_the_jacobian_of_a_mixture_is_that_of_finite_differences(schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(ring(), schedule)
    options = replace(sds(2.0, "sigma_squared", 0.3), jacobian=True)
    conditionings = encode_prompts(teacher.encode_text, ["c1", "c2"], options)
    points = torch.tensor([[0.4, 0.3], [-0.6, 0.1]])[:, :, None, None]
    output = distill_step(teacher, options, points, conditionings)

    def loss(values: Tensor) -> Tensor:
        x_t = schedule.add_noise(values, output.noise, output.t)
        cond, uncond = (
            teacher.predict(x_t, output.t, conditionings.select(name, 2)).eps
            for name in ("conditional", "unconditional")
        )
        residual = uncond + 2.0 * (cond - uncond) - output.noise
        return 0.5 * (schedule.sigma(output.t).square() * residual.square()).sum().double()

    for index in ((0, 0), (0, 1), (1, 0), (1, 1)):
        step = torch.zeros_like(points)
        step[index] = 1e-2
        slope = (loss(points + step) - loss(points - step)) / 2e-2
        assert float(slope) == pytest.approx(float(output.gradient[index]), abs=2e-3, rel=2e-2)


def test_the_jacobian_is_of_a_plain_loss_and_costs_twice_as_much() -> None:
    plain = sds(2.0)
    assert replace(plain, jacobian=True).cost() == 2 * plain.cost() == 4
    for change in ({"normalise": True}, {"image": 1.0}, {"noise": NoiseSource("inversion")}):
        with pytest.raises(UserError, match="jacobian is of a loss of the teacher alone"):
            replace(plain, jacobian=True, **change)  # type: ignore[arg-type]
