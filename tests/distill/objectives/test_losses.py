"""Every loss of configs/objective on closed-form teachers: its mean gradient against arithmetic, its NFE
counted.
"""

import itertools
import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from command_line import ROOT
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule
from distill.core.score import NFECounter, Prediction, ScoreModel
from distill.objectives.algebra import DistillationOutput, ScoreDistillation
from distill.objectives.options import (
    LinearSchedule,
    LossComponent,
    NoiseSource,
    ObjectiveOptions,
    Term,
    TimestepSampler,
)
from distill.objectives.prompts import PromptConditionings
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.teacher.mixture import Mixture, MixtureTeacher

CONFIGS = ROOT / "configs" / "objective"
LOSSES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
FRACTION = 0.45  # the t / T of the closed forms


def load(name: str, fraction: float | None = FRACTION) -> ObjectiveOptions:
    """A config as scripts read it, at one time."""
    options = build(ObjectiveOptions, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()), name)
    return (
        options
        if fraction is None
        else replace(options, time=TimestepSampler(fraction, (fraction, fraction)))
    )


def mixture() -> Mixture:
    """Two classes of one unequal pair of components each, on a line."""
    values = {"means": (-1.0, 0.4, 0.2, 1.5), "stds": (0.3, 0.15, 0.2, 0.4)}
    means, stds = (torch.tensor(value, dtype=torch.float64)[:, None, None, None] for value in values.values())
    return Mixture(means, stds, torch.tensor([0.3, 0.2, 0.1, 0.4], dtype=torch.float64), ("a", "a", "b", "b"))


def prompts(teacher: MixtureTeacher, count: int) -> PromptConditionings:
    """Class a as the prompt; class b as negative, reference and Perp-Neg prompt."""
    a, b, uncond = teacher.encode_text(["a"] * count), teacher.encode_text(["b"]), teacher.encode_text([""])
    rest = {name: b for name in ("negative", "reference", "bad", "perp_neg_0", "perp_neg_1", "critic")}
    return PromptConditionings({"conditional": a, "unconditional": uncond, **rest})


def line(name: str, x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """eps of class a or b, or of the whole, by numpy alone."""
    parts = {"a": ((0.6, -1.0, 0.3), (0.4, 0.4, 0.15)), "b": ((0.2, 0.2, 0.2), (0.8, 1.5, 0.4))}
    parts["all"] = tuple((0.5 * w, m, s) for key in ("a", "b") for w, m, s in parts[key])
    top, bottom = np.zeros_like(x), np.zeros_like(x)
    for w, m, s in parts[name]:
        v = alpha**2 * s**2 + sigma**2
        density = w * np.exp(-0.5 * (x - alpha * m) ** 2 / v) / math.sqrt(v)
        top, bottom = top + density * sigma * (x - alpha * m) / v, bottom + density
    return top / bottom


def levels(schedule: NoiseSchedule, fraction: float = FRACTION) -> tuple[float, float]:
    t = torch.tensor([round(fraction * (schedule.num_train_timesteps - 1))])
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def expected(name: str, z: float, alpha: float, sigma: float) -> float:
    """The mean of g over fresh noise, by Gauss-Hermite quadrature of 200 points."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    x, weights = alpha * z + sigma * nodes, weights / weights.sum()
    a, b, uncond = (line(key, x, alpha, sigma) for key in ("a", "b", "all"))
    guided = {scale: uncond + scale * (a - uncond) for scale in (7.5, 10.0, 20.0)}
    total = {
        "sds": sigma**2 * guided[20.0],
        "sjc": guided[10.0],
        "csd": sigma**2 * (a - uncond),
        "nfsd": sigma**2 * (7.5 * (a - uncond) + uncond - b),
        "sds_bridge": sigma**2 * guided[10.0],
        "hifa": sigma**2 * guided[10.0],
        "vsd": sigma**2 * (guided[7.5] - b),
        "diff_instruct": a - b,
    }[name]
    return float((weights * total).sum())


@pytest.mark.parametrize("name", ["sds", "sjc", "csd", "nfsd", "sds_bridge", "hifa", "vsd", "diff_instruct"])
def test_mean_gradient_is_its_closed_form(name: str, schedule: NoiseSchedule) -> None:
    """40,000 draws of fresh noise against quadrature, within four standard errors."""
    count, z = 40_000, 0.3
    teacher = MixtureTeacher(mixture(), schedule)
    conditionings = prompts(teacher, count)
    # a critic that predicts class b under any prompt
    critic = FixedPrompt(teacher, conditionings.by_name["critic"]) if load(name).needs_critic else None
    loss = ScoreDistillation(teacher, load(name), critic, decode=lambda latents: latents)
    latents = torch.full((count, 1, 1, 1), z, dtype=torch.float64)
    output = loss(latents, conditionings, 0.0, torch.Generator().manual_seed(0)).gradient
    error = float(output.std()) / count**0.5
    value = expected(name, z, *levels(schedule))
    assert abs(float(output.mean()) - value) < 4 * error
    assert abs(value) > 10 * error  # a wrong weight or term would exceed the tolerance


class FixedPrompt(ScoreModel):
    """A model that ignores its conditioning in favour of a fixed one."""

    def __init__(self, model: ScoreModel, fixed: Conditioning) -> None:
        self.model, self.fixed, self.schedule = model, fixed, model.schedule

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        return self.model.predict(x_t, t, self.fixed.expand(len(x_t)))


def gauss_flow(
    z: float, mean: float, std: float, alpha: float, sigma: float, first: tuple[float, float]
) -> float:
    """z at the first level after the probability-flow ODE of N(mean, std^2), which keeps quantiles."""
    std_ratio = math.sqrt((alpha**2 * std**2 + sigma**2) / (first[0] ** 2 * std**2 + first[1] ** 2))
    return alpha * mean + std_ratio * (z - first[0] * mean)


def test_inversion_follows_the_exact_flow(gaussian: Any, schedule: NoiseSchedule) -> None:
    """With many steps x_t and the earlier point (ISM, SDI) lie on the exact ODE of a Gaussian."""
    from distill.objectives.inversion import invert

    z, mean, std = 1.1, 0.3, 0.5
    t = torch.tensor([700])
    trajectory = invert(
        gaussian(std),
        torch.full((1, 1, 1, 1), z),
        t,
        {"conditional": Conditioning(torch.full((1, 1, 1), mean))},
        1.0,
        600,
        100,
    )
    first = levels(schedule, 0.0)
    for x, time in ((trajectory.x_t, t), (trajectory.x_s, trajectory.s)):
        alpha, sigma = float(schedule.alpha(time)), float(schedule.sigma(time))
        exact = gauss_flow(z, mean, std, alpha, sigma, first)
        assert float(x) == pytest.approx(exact, abs=0.01)
    assert int(trajectory.s) == 600


def slow_inversion(
    z: float, t: int, steps: int, gap: int, guidance: float, schedule: NoiseSchedule
) -> tuple[float, float, int]:
    """DDIM inversion in numpy, step by step: x_t, x_s and s."""
    times = [round(i * (t - gap) / steps) for i in range(steps + 1)] + ([t] if gap else [])
    x = before = z
    for now, following in itertools.pairwise(times):
        alpha, sigma = (float(f(torch.tensor([now]))) for f in (schedule.alpha, schedule.sigma))
        uncond, cond = (float(line(key, np.array(x), alpha, sigma)) for key in ("all", "a"))
        eps = uncond + guidance * (cond - uncond)
        later = [float(f(torch.tensor([following]))) for f in (schedule.alpha, schedule.sigma)]
        before, x = x, later[0] * (x - sigma * eps) / alpha + later[1] * eps
    return x, before, times[-2]


@pytest.mark.parametrize("name", ["ism", "sdi"])
def test_losses_on_an_inversion_trajectory_against_a_slow_one(name: str, schedule: NoiseSchedule) -> None:
    """They have no noise to average: g itself is compared."""
    z, options = 0.3, load(name)
    t = round(FRACTION * (schedule.num_train_timesteps - 1))
    gap = round(0.1 * schedule.num_train_timesteps) if name == "ism" else 0
    x_t, x_s, s = slow_inversion(z, t, options.noise.steps, gap, options.noise.guidance, schedule)
    alpha, sigma = levels(schedule)
    uncond, cond = (float(line(key, np.array(x_t), alpha, sigma)) for key in ("all", "a"))
    guided = uncond + 7.5 * (cond - uncond)
    if name == "ism":
        early = [float(f(torch.tensor([s]))) for f in (schedule.alpha, schedule.sigma)]
        value = sigma / alpha * (guided - float(line("all", np.array(x_s), *early)))
    else:
        value = z - (x_t - sigma * guided) / alpha  # the paper's own form
    teacher = MixtureTeacher(mixture(), schedule)
    latents = torch.full((2, 1, 1, 1), z, dtype=torch.float64)
    output = ScoreDistillation(teacher, options)(
        latents, prompts(teacher, 2), 0.0, torch.Generator()
    ).gradient
    assert output.flatten().tolist() == pytest.approx([value, value], rel=1e-4)


def test_recon_is_half_the_squared_distance_to_x0(schedule: NoiseSchedule) -> None:
    """Without rescale g = z - x0_hat; with full rescale x0_hat has the standard deviation of the unguided
    one.
    """
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    conditionings = prompts(teacher, 3)
    options = load("recon")
    plain = replace(options, terms=(replace(options.terms[0], rescale=0.0), options.terms[1]))
    output = run(teacher, plain, z, conditionings)
    guided = output.predictions["unconditional"].extrapolate(output.predictions["conditional"], 10.0)
    torch.testing.assert_close(output.gradient, z - guided.x0, atol=1e-5, rtol=1e-5)
    whole = replace(options, terms=(replace(options.terms[0], rescale=1.0), options.terms[1]))
    x0 = z - run(teacher, whole, z, conditionings).gradient
    stds = [value.std((1, 2, 3)) for value in (x0, output.predictions["conditional"].x0, guided.x0)]
    torch.testing.assert_close(stds[0], stds[1], atol=1e-5, rtol=1e-4)
    assert float((stds[2] - stds[1]).abs().min()) > 0.01
    half = z - run(teacher, options, z, conditionings).gradient
    torch.testing.assert_close(half, (x0 + guided.x0) / 2, atol=1e-5, rtol=1e-5)


def wide_mixture() -> Mixture:
    """Three classes of two components each in 16 dimensions."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(6, 1, 4, 4, generator=generator, dtype=torch.float64)
    return Mixture(
        means, torch.full_like(means, 0.5), torch.full((6,), 1 / 6, dtype=torch.float64), tuple("aabbcc")
    )


def run(
    teacher: ScoreModel,
    options: ObjectiveOptions,
    z: Tensor,
    conditionings: PromptConditionings,
    **more: Tensor,
) -> DistillationOutput:
    return ScoreDistillation(teacher, options, decode=lambda x: x)(
        z, conditionings, 0.0, torch.Generator().manual_seed(0), **more
    )


def test_perp_neg_by_hand(schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z, conditionings = torch.zeros(2, 1, 4, 4, dtype=torch.float64), prompts(teacher, 2)
    output = run(teacher, load("sds_perp_neg"), z, conditionings)
    uncond, cond, other = (
        output.predictions[name].eps for name in ("unconditional", "conditional", "perp_neg_0")
    )
    direction, repelled = cond - uncond, other - uncond
    square = direction.square().sum((1, 2, 3), keepdim=True)
    perpendicular = repelled - (repelled * direction).sum((1, 2, 3), keepdim=True) / square * direction
    assert (perpendicular * direction).sum((1, 2, 3)).abs().max() < 1e-6 < perpendicular.abs().max()
    guided = uncond + 10 * (direction - 0.5 * 2 * perpendicular)  # both Perp-Neg prompts are class b here
    torch.testing.assert_close(
        output.gradient,
        schedule.sigma(output.t).double() ** 2 * (guided - output.noise),
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize("guidance", [1.0, 10.0])
def test_contrast_by_hand(guidance: float, schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z, conditionings = torch.zeros(2, 1, 4, 4, dtype=torch.float64), prompts(teacher, 2)
    options = replace(
        load("sds"), terms=(Term("teacher", guidance=guidance, contrast=3.0), Term("noise", -1.0))
    )
    output = run(teacher, options, z, conditionings)
    cond, other = (
        output.predictions[name].eps for name in ("conditional", "perp_neg_0")
    )  # both Perp-Neg prompts are class b
    uncond = output.predictions["unconditional"].eps if guidance > 1 else cond
    target = uncond + guidance * (cond - uncond) + 3 * (cond - other)
    assert (cond - other).abs().max() > 1e-3
    torch.testing.assert_close(
        output.gradient,
        schedule.sigma(output.t).double() ** 2 * (target - output.noise),
        atol=1e-5,
        rtol=1e-4,
    )
    with pytest.raises(UserError, match="a term of the noise takes no"):
        Term("noise", contrast=1.0)


def test_dds_of_an_image_with_its_own_source_is_zero(schedule: NoiseSchedule) -> None:
    """The same image and prompt cancel for every noise; another prompt leaves the difference of two SDS
    gradients.
    """
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z, conditionings = (
        torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        prompts(teacher, 2),
    )
    same = PromptConditionings({**conditionings.by_name, "reference": conditionings.by_name["conditional"]})
    assert float(run(teacher, load("dds"), z, same, reference=z).gradient.abs().max()) < 1e-12
    output = run(teacher, load("dds"), z, conditionings, reference=z + 1).gradient
    sds = replace(load("sds"), terms=(Term("teacher", guidance=7.5), Term("noise", -1.0)))
    source = PromptConditionings(
        {**conditionings.by_name, "conditional": conditionings.by_name["reference"].expand(2)}
    )
    difference = run(teacher, sds, z, conditionings).gradient - run(teacher, sds, z + 1, source).gradient
    torch.testing.assert_close(output, difference)
    with pytest.raises(UserError, match="give the reference's latents"):
        run(teacher, load("dds"), z, conditionings)


def test_hifa_moves_the_image_too(schedule: NoiseSchedule) -> None:
    """lambda w (alpha / sigma) (x - decoded x0), over the batch, through a decoder that doubles."""
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z, conditionings = torch.zeros(2, 1, 4, 4, dtype=torch.float64), prompts(teacher, 2)
    images = torch.ones(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = ScoreDistillation(teacher, load("hifa"), decode=lambda latents: 2 * latents)
    output = loss(z, conditionings, 0.0, torch.Generator().manual_seed(0), images=images)
    output.loss.backward()
    x0 = output.predictions["unconditional"].extrapolate(output.predictions["conditional"], 10.0).x0
    alpha, sigma = schedule.alpha(output.t).double(), schedule.sigma(output.t).double()
    torch.testing.assert_close(
        images.grad, 0.01 * sigma**2 * alpha / sigma * (1 - 2 * x0) / 2, atol=1e-6, rtol=1e-5
    )


def test_pixels_have_their_own_guidance(schedule: NoiseSchedule) -> None:
    """sds_pixels: the latents' gradient is SDS's at 20, the pixels' target x0 at 3, from the same two
    predictions.
    """
    teacher = NFECounter(MixtureTeacher(wide_mixture(), schedule))
    z, conditionings = (
        torch.zeros(2, 1, 4, 4, dtype=torch.float64),
        prompts(cast(MixtureTeacher, teacher.model), 2),
    )
    images = torch.ones(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = ScoreDistillation(teacher, load("sds_pixels"), decode=lambda latents: latents)
    output = loss(z, conditionings, 0.0, torch.Generator().manual_seed(0), images=images)
    output.loss.backward()
    plain = ScoreDistillation(teacher, load("sds"))(z, conditionings, 0.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(output.gradient, plain.gradient)
    x0 = output.predictions["unconditional"].extrapolate(output.predictions["conditional"], 3.0).x0
    alpha, sigma = schedule.alpha(output.t).double(), schedule.sigma(output.t).double()
    torch.testing.assert_close(images.grad, 10.0 * sigma * alpha * (1 - x0) / 2, atol=1e-6, rtol=1e-5)
    assert teacher.calls == 2


def test_pixels_alone_are_predicted_too(schedule: NoiseSchedule) -> None:
    """A coefficient of 0 leaves the latents alone; the residual in pixels still needs, and counts, the
    teacher.
    """
    options = ObjectiveOptions((Term("teacher", 0.0, guidance=7.5), Term("noise", 0.0)), image=1.0)
    assert options.cost() == 2
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    images = torch.ones(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = ScoreDistillation(teacher, options, decode=lambda latents: latents)
    output = loss(z, prompts(teacher, 2), 0.0, torch.Generator().manual_seed(0), images=images)
    output.loss.backward()
    assert (
        float(output.gradient.abs().max()) == 0
        and images.grad is not None
        and float(images.grad.abs().min()) > 0
    )


@pytest.mark.parametrize("progress", [0.0, 1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_stated_nfe_is_the_counted_one(name: str, progress: float, schedule: NoiseSchedule) -> None:
    """One batched teacher call a step, and one an inversion step; NFE as `cost` counts it without critic
    updates.
    """
    plain = MixtureTeacher(wide_mixture(), schedule)
    teacher, critic = NFECounter(plain), NFECounter(plain)
    options = load(name, None)
    loss = ScoreDistillation(teacher, options, critic if options.needs_critic else None, decode=lambda x: x)
    z = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    loss(z, prompts(plain, 3), progress, torch.Generator().manual_seed(0), reference=z)
    updates = 0 if options.critic is None else 3 * options.critic.updates
    passes = 2 if options.jacobian else 1  # a backward pass is work, no function evaluation
    assert passes * (teacher.nfe + critic.nfe) == 3 * (options.cost(progress) - updates)
    inversion = options.noise.steps + options.noise.has_gap if options.noise.kind == "inversion" else 0
    assert (teacher.calls, critic.calls) == (1 + inversion, int(options.needs_critic))


def test_a_wrong_stated_nfe_stops_the_run(schedule: NoiseSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = MixtureTeacher(wide_mixture(), schedule)
    monkeypatch.setattr(LossComponent, "nfe", lambda part, progress: 3)
    with pytest.raises(RuntimeError, match=r"took 2.0 NFE a sample but states 3"):
        run(teacher, load("sds"), torch.zeros(3, 1, 4, 4, dtype=torch.float64), prompts(teacher, 3))


def test_stated_costs() -> None:
    """SDS is a guided pair, VSD adds one evaluation and a critic update, SDI pays for its inversion."""
    assert [
        load(name).cost() for name in ("sds", "csd", "ism", "sdi", "vsd", "diff_instruct", "sds_perp_neg")
    ] == [2, 2, 8, 22, 6, 5, 4]
    assert [load("sds_bridge").cost(progress) for progress in (0.0, 1.0)] == [2, 2]


def test_guidance_one_does_not_evaluate_the_unconditional(schedule: NoiseSchedule) -> None:
    teacher = NFECounter(MixtureTeacher(wide_mixture(), schedule))
    plain = replace(load("sds"), terms=(Term("teacher"), Term("noise", -1.0)))
    output = run(
        teacher,
        plain,
        torch.zeros(3, 1, 4, 4, dtype=torch.float64),
        prompts(cast(MixtureTeacher, teacher.model), 3),
    )
    assert teacher.nfe == 3 and set(output.predictions) == {"conditional"}


def test_identities(schedule: NoiseSchedule) -> None:
    """SJC is SDS / sigma^2; recon without rescale is SDS with sigma / alpha; SDS is its conditional part +
    CSD.
    """
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z, conditionings = (
        torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        prompts(teacher, 3),
    )
    guided = (Term("teacher", guidance=10.0), Term("noise", -1.0))
    sds, sjc = (run(teacher, replace(load(name), terms=guided), z, conditionings) for name in ("sds", "sjc"))
    csd = run(teacher, load("csd"), z, conditionings)
    alpha, sigma = schedule.alpha(sds.t).double(), schedule.sigma(sds.t).double()
    torch.testing.assert_close(sjc.gradient * sigma**2, sds.gradient)
    options = load("recon")
    recon = run(
        teacher,
        replace(options, terms=(replace(options.terms[0], rescale=0.0), options.terms[1])),
        z,
        conditionings,
    )
    torch.testing.assert_close(recon.gradient, sds.gradient / sigma**2 * sigma / alpha)
    cond = run(teacher, replace(load("sds"), terms=(Term("teacher"), Term("noise", -1.0))), z, conditionings)
    torch.testing.assert_close(sds.gradient, cond.gradient + 9 * csd.gradient)


def kl(theta: float, std: float, fraction: float, schedule: NoiseSchedule) -> float:
    """KL(q_t | p_t) of N(theta, std^2) against class a, by quadrature on a fine grid, without any score."""
    alpha, sigma = levels(schedule, fraction)
    x = np.linspace(-8, 8, 40_001)
    v = alpha**2 * std**2 + sigma**2
    q = np.exp(-0.5 * (x - alpha * theta) ** 2 / v) / math.sqrt(2 * math.pi * v)
    p = np.zeros_like(x)
    for w, m, s in ((0.6, -1.0, 0.3), (0.4, 0.4, 0.15)):
        u = alpha**2 * s**2 + sigma**2
        p += w * np.exp(-0.5 * (x - alpha * m) ** 2 / u) / math.sqrt(2 * math.pi * u)
    return float(np.trapezoid(q * (np.log(q + 1e-300) - np.log(p + 1e-300)), x))


@pytest.mark.parametrize("fraction", [0.2, 0.6])
def test_diff_instruct_with_the_exact_critic_is_the_gradient_of_kl(
    fraction: float, schedule: NoiseSchedule
) -> None:
    """z = theta + std n, an exact critic: (alpha / sigma) E[g] = d KL(q_t | p_t) / d theta."""
    theta, std, count, step = 0.1, 0.4, 200_000, 1e-4
    slope = (kl(theta + step, std, fraction, schedule) - kl(theta - step, std, fraction, schedule)) / (
        2 * step
    )
    own = torch.tensor([[[[theta]]]], dtype=torch.float64)
    exact = MixtureTeacher(
        Mixture(own, torch.full_like(own, std), torch.ones(1, dtype=torch.float64), ("own",)), schedule
    )
    teacher = MixtureTeacher(mixture(), schedule)
    generator = torch.Generator().manual_seed(0)
    z = theta + std * torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)
    critic = FixedPrompt(exact, exact.encode_text(["own"]))
    loss = ScoreDistillation(teacher, load("diff_instruct", fraction), critic)
    output = loss(z, prompts(teacher, count), 0.0, generator).gradient
    alpha, sigma = levels(schedule, fraction)
    error = alpha / sigma * float(output.std()) / count**0.5
    assert abs(alpha / sigma * float(output.mean()) - slope) < 4 * error
    assert abs(slope) > 30 * error


def test_a_critic_equal_to_the_teacher_gives_zero(schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z, conditionings = (
        torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        prompts(teacher, 4),
    )
    output = ScoreDistillation(teacher, load("diff_instruct"), teacher)(
        z, conditionings, 0.0, torch.Generator().manual_seed(0)
    )
    assert float(output.gradient.abs().max()) == 0


def test_two_components_have_their_own_times_in_one_call(schedule: NoiseSchedule) -> None:
    """Decoupled timestep samplers: the sum of the gradients of each component alone."""
    teacher = NFECounter(MixtureTeacher(wide_mixture(), schedule))
    z, conditionings = (
        torch.zeros(3, 1, 4, 4, dtype=torch.float64),
        prompts(cast(MixtureTeacher, teacher.model), 3),
    )
    fixed = NoiseSource("fixed", seed=5)
    early, late = (
        LossComponent((Term("teacher", c),), "one", TimestepSampler(s, (s, s)), fixed)
        for c, s in ((2.0, 0.2), (-1.0, 0.8))
    )
    joint = run(
        teacher, ObjectiveOptions(early.terms, "one", early.time, fixed, second=late), z, conditionings
    )
    assert teacher.calls == 1 and teacher.nfe == 6
    alone = [
        run(teacher, ObjectiveOptions(part.terms, "one", part.time, fixed), z, conditionings).gradient
        for part in (early, late)
    ]
    torch.testing.assert_close(joint.gradient, alone[0] + alone[1])
    assert len(joint.terms) == 2


def test_fixed_noise_stays_and_fresh_does_not(schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z, conditionings, generator = (
        torch.zeros(2, 1, 4, 4),
        prompts(teacher, 2),
        torch.Generator().manual_seed(0),
    )
    for kind, same in (("fixed", True), ("fresh", False)):
        loss = ScoreDistillation(teacher, replace(load("sds"), noise=NoiseSource(kind, seed=1)))  # type: ignore[arg-type]
        noises = [loss(z, conditionings, 0.0, generator).noise for _ in range(2)]
        assert torch.equal(*noises) is same


def test_normalised_samples_have_equal_weight(schedule: NoiseSchedule) -> None:
    """g is divided by mean |z - x0|: with w = sigma / alpha and no critic that is g / mean |g|."""
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)[:, None, None, None].expand(3, 1, 4, 4)
    options = replace(
        load("sds"), terms=(Term("teacher"), Term("noise", -1.0)), weight="sigma_over_alpha", normalise=True
    )
    output = run(teacher, options, z, prompts(teacher, 3)).gradient
    torch.testing.assert_close(
        output.abs().mean((1, 2, 3)), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=1e-5
    )


def test_schedules_and_inactive_terms() -> None:
    ramp = LinearSchedule(0.0, -1.0, 0.2, 0.6)
    assert [ramp.value(p) for p in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0, 0, -0.5, -1, -1])
    part = LossComponent((Term("teacher", ramp, "negative"), Term("teacher")))
    assert part.queries("teacher", 0.0) == (("now", "conditional"),)  # an inactive term is not evaluated
    assert len(part.queries("teacher", 0.5)) == 2


def test_terms_are_active_in_their_t_range_only(schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(wide_mixture(), schedule)
    options = ObjectiveOptions(
        (Term("teacher", t_range=(0.2, 1.0)),), "one", TimestepSampler(0.0, (1.0, 1.0))
    )
    output = run(teacher, options, torch.zeros(200, 1, 4, 4, dtype=torch.float64), prompts(teacher, 200))
    size = output.gradient.abs().amax((1, 2, 3))
    assert torch.equal(size > 0, output.t >= 200) and 20 < int((output.t < 200).sum()) < 60


@pytest.mark.parametrize(
    "given, words",
    [
        ({"terms": [{"predict": "noise", "guidance": 3.0}]}, "takes no guidance"),
        (
            {"terms": [{"predict": "teacher", "eval_point": "earlier"}]},
            "give noise.kind=inversion and a noise.gap",
        ),
        ({"terms": [{"predict": "noise"}], "normalise": True}, "no term of the teacher"),
        (
            {
                "terms": [
                    {
                        "predict": "noise",
                        "coefficient": {"start": 0.0, "end": 1.0, "begin": 0.5, "until": 0.5},
                    }
                ]
            },
            "begin < until",
        ),
        ({"terms": [{"predict": "noise"}], "critic": {"rank": 0}}, "rank and updates"),
        ({"terms": [{"predict": "noise"}], "image": 1.0}, "no term of the teacher"),
        ({"terms": [{"predict": "teacher"}], "image": -1.0}, "at least 0"),
        ({"terms": [{"predict": "teacher"}], "image": 1.0, "image_guidance": 3.0}, "image_guidance needs"),
        ({"terms": [{"predict": "teacher", "guidance": 7.5}], "image_guidance": 3.0}, "image_guidance needs"),
        (
            {"terms": [{"predict": "noise"}], "noise": {"kind": "inversion", "steps": 0}},
            "at least 1 is needed",
        ),
    ],
)
def test_mistakes(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(ObjectiveOptions, given, "objective")


def test_missing_critic_decoder_and_prompt_raise(schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(wide_mixture(), schedule)
    with pytest.raises(UserError, match="give a critic"):
        ScoreDistillation(teacher, load("vsd"))
    with pytest.raises(UserError, match="give a decoder"):
        ScoreDistillation(teacher, load("hifa"))
    with pytest.raises(UserError, match="prompt 'bad': add it to the objective's prompts"):
        run(
            teacher,
            load("nfsd"),
            torch.zeros(1, 1, 4, 4),
            PromptConditionings(
                {"conditional": teacher.encode_text(["a"]), "unconditional": teacher.encode_text([""])}
            ),
        )


@pytest.mark.parametrize("ratio, overshoots", [(2.0, True), (3.0, True), (4.5, False), (6.0, False)])
def test_a_critic_four_times_as_fast_never_overshoots(
    ratio: float, overshoots: bool, gaussian: Any, schedule: NoiseSchedule
) -> None:
    """Two time scales on Gaussian means: m' = -eta c f, f' = rho (m - f) overshoots iff rho < 4 eta c."""
    fraction = 0.5
    alpha, sigma = levels(schedule, fraction)
    slope = (
        sigma * alpha / (alpha**2 * 0.25 + sigma**2)
    )  # c: g per unit of the critic's mean, the teacher's being 0
    mean, belief, eta = torch.ones(1, 1, 1, 1), 1.0, 0.02
    teacher, conditionings = (
        gaussian(0.5),
        PromptConditionings({"conditional": Conditioning(torch.zeros(1, 1, 1))}),
    )
    lowest = 1.0
    for _ in range(1500):
        critic = FixedPrompt(gaussian(0.5), Conditioning(torch.full((1, 1, 1), belief)))
        g = ScoreDistillation(teacher, load("diff_instruct", fraction), critic)(
            mean, conditionings, 0.0, torch.Generator()
        ).gradient
        assert float(g) == pytest.approx(slope * belief, abs=1e-5)
        belief += ratio * eta * slope * (float(mean) - belief)
        mean = mean - eta * g
        lowest = min(lowest, float(mean))
    assert (lowest < -1e-3) is overshoots
