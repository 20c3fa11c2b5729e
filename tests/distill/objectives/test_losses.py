"""Every loss of configs/objective on teachers known in closed form: its mean gradient against arithmetic, its cost against a count."""

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

from distill.core.noise import NoiseSchedule
from distill.core.score import NFECounter, Prediction, ScoreModel
from distill.objectives.algebra import DistillationOutput, PromptConditionings, ScoreDistillation
from distill.objectives.options import (
    LinearSchedule,
    LossComponent,
    NoiseSource,
    ObjectiveOptions,
    Term,
    TimestepSampler,
)
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.teacher.mixture import Mixture, MixtureTeacher

CONFIGS = ROOT / "configs" / "objective"
LOSSES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SHARE = 0.45  # the t / T of the closed forms


def load(name: str, share: float | None = SHARE) -> ObjectiveOptions:
    """A config as scripts read it, at one time."""
    options = build(ObjectiveOptions, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()), name)
    return options if share is None else replace(options, time=TimestepSampler(share, (share, share)))


def mixture() -> Mixture:
    """Two classes of one unequal pair of components each, on a line."""
    values = {"means": (-1.0, 0.4, 0.2, 1.5), "stds": (0.3, 0.15, 0.2, 0.4)}
    means, stds = (torch.tensor(value, dtype=torch.float64)[:, None, None, None] for value in values.values())
    return Mixture(means, stds, torch.tensor([0.3, 0.2, 0.1, 0.4], dtype=torch.float64), ("a", "a", "b", "b"))


def states(teacher: MixtureTeacher, count: int) -> PromptConditionings:
    """Class a, told apart from the whole; class b as negative, reference and other view."""
    a, b, free = teacher.encode_text(["a"] * count), teacher.encode_text(["b"]), teacher.encode_text([""])
    rest = {name: b for name in ("negative", "reference", "bad", "other_view_0", "other_view_1", "critic")}
    return PromptConditionings({"conditional": a, "unconditional": free, **rest})


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


def levels(schedule: NoiseSchedule, share: float = SHARE) -> tuple[float, float]:
    t = torch.tensor([round(share * (schedule.num_train_timesteps - 1))])
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def expected(name: str, z: float, alpha: float, sigma: float) -> float:
    """The mean of g over fresh noise, by Gauss-Hermite quadrature of 200 points."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    x, weights = alpha * z + sigma * nodes, weights / weights.sum()
    a, b, free = (line(key, x, alpha, sigma) for key in ("a", "b", "all"))
    guided = {scale: free + scale * (a - free) for scale in (7.5, 10.0, 20.0)}
    total = {
        "sds": sigma**2 * guided[20.0],
        "sjc": guided[10.0],
        "csd": sigma**2 * (a - free),
        "nfsd": sigma**2 * (7.5 * (a - free) + free - b),
        "sds_bridge": sigma**2 * guided[10.0],
        "hifa": sigma**2 * guided[10.0],
        "vsd": sigma**2 * (guided[7.5] - b),
        "diff_instruct": a - b,
    }[name]
    return float((weights * total).sum())


@pytest.mark.parametrize("name", ["sds", "sjc", "csd", "nfsd", "sds_bridge", "hifa", "vsd", "diff_instruct"])
def test_mean_gradient_is_its_closed_form(name: str, schedule: NoiseSchedule) -> None:
    """40,000 draws of fresh noise against quadrature, within four standard errors that are small beside the value."""
    count, z = 40_000, 0.3
    teacher = MixtureTeacher(mixture(), schedule)
    conditions = states(teacher, count)
    if name == "diff_instruct":  # the critic is told the prompt; here it stands for another class
        conditions = PromptConditionings(
            {**conditions.states, "conditional": conditions.states["conditional"]}
        )
    critic = Switched(teacher, conditions.states["critic"]) if load(name).needs_critic else None
    loss = ScoreDistillation(teacher, load(name), critic, decode=lambda latents: latents)
    latents = torch.full((count, 1, 1, 1), z, dtype=torch.float64)
    told = loss(latents, conditions, 0.0, torch.Generator().manual_seed(0)).gradient
    error = float(told.std()) / count**0.5
    value = expected(name, z, *levels(schedule))
    assert abs(float(told.mean()) - value) < 4 * error
    assert abs(value) > 10 * error  # another weight or term would be seen


class Switched(ScoreModel):
    """A model that is told one condition whatever it is asked."""

    def __init__(self, model: ScoreModel, condition: Tensor) -> None:
        self.model, self.condition, self.schedule = model, condition, model.schedule

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        return self.model.predict(x_t, t, self.condition.expand(len(x_t), -1, -1))


def gauss_flow(
    z: float, mean: float, std: float, alpha: float, sigma: float, first: tuple[float, float]
) -> float:
    """Where the probability-flow ODE of N(mean, std^2) carries z from the first level (Song et al. 2021): quantiles stay."""
    spread = math.sqrt((alpha**2 * std**2 + sigma**2) / (first[0] ** 2 * std**2 + first[1] ** 2))
    return alpha * mean + spread * (z - first[0] * mean)


def test_inversion_follows_the_exact_flow(gaussian: Any, schedule: NoiseSchedule) -> None:
    """ISM and SDI rest on it: with many steps x_t and the earlier point are where the ODE of a Gaussian carries them."""
    from distill.objectives.inversion import invert

    z, mean, std = 1.1, 0.3, 0.5
    t = torch.tensor([700])
    path = invert(
        gaussian(std),
        torch.full((1, 1, 1, 1), z),
        t,
        {"conditional": torch.full((1, 1, 1), mean)},
        1.0,
        600,
        100,
    )
    first = levels(schedule, 0.0)
    for x, at in ((path.x_t, t), (path.x_s, path.s)):
        exact = gauss_flow(z, mean, std, float(schedule.alpha(at)), float(schedule.sigma(at)), first)
        assert float(x) == pytest.approx(exact, abs=0.01)
    assert int(path.s) == 600


def slow_path(
    z: float, t: int, steps: int, gap: int, guidance: float, schedule: NoiseSchedule
) -> tuple[float, float, int]:
    """DDIM inversion in numpy, step by step: x_t, x_s and s."""
    times = [round(i * (t - gap) / steps) for i in range(steps + 1)] + ([t] if gap else [])
    x = before = z
    for now, following in itertools.pairwise(times):
        alpha, sigma = (float(f(torch.tensor([now]))) for f in (schedule.alpha, schedule.sigma))
        free, bound = (float(line(key, np.array(x), alpha, sigma)) for key in ("all", "a"))
        eps = free + guidance * (bound - free)
        later = [float(f(torch.tensor([following]))) for f in (schedule.alpha, schedule.sigma)]
        before, x = x, later[0] * (x - sigma * eps) / alpha + later[1] * eps
    return x, before, times[-2]


@pytest.mark.parametrize("name", ["ism", "sdi"])
def test_losses_on_an_inversion_path_against_a_slow_one(name: str, schedule: NoiseSchedule) -> None:
    """They have no noise to average: g itself is compared."""
    z, options = 0.3, load(name)
    t = round(SHARE * (schedule.num_train_timesteps - 1))
    gap = round(0.1 * schedule.num_train_timesteps) if name == "ism" else 0
    x_t, x_s, s = slow_path(z, t, options.noise.steps, gap, options.noise.guidance, schedule)
    alpha, sigma = levels(schedule)
    free, bound = (float(line(key, np.array(x_t), alpha, sigma)) for key in ("all", "a"))
    guided = free + 7.5 * (bound - free)
    if name == "ism":
        early = [float(f(torch.tensor([s]))) for f in (schedule.alpha, schedule.sigma)]
        value = sigma / alpha * (guided - float(line("all", np.array(x_s), *early)))
    else:
        value = z - (x_t - sigma * guided) / alpha  # the paper's own form
    teacher = MixtureTeacher(mixture(), schedule)
    latents = torch.full((2, 1, 1, 1), z, dtype=torch.float64)
    told = ScoreDistillation(teacher, options)(latents, states(teacher, 2), 0.0, torch.Generator()).gradient
    assert told.flatten().tolist() == pytest.approx([value, value], rel=1e-4)


def test_recon_is_half_the_squared_distance_to_x0(schedule: NoiseSchedule) -> None:
    """Without rescale g = z - x0_hat; with all of it x0_hat has the spread of the unguided one."""
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    conditions = states(teacher, 3)
    options = load("recon")
    plain = replace(options, terms=(replace(options.terms[0], rescale=0.0), options.terms[1]))
    told = run(teacher, plain, z, conditions)
    guided = told.predictions["unconditional"].extrapolate(told.predictions["conditional"], 10.0)
    torch.testing.assert_close(told.gradient, z - guided.x0, atol=1e-5, rtol=1e-5)
    whole = replace(options, terms=(replace(options.terms[0], rescale=1.0), options.terms[1]))
    x0 = z - run(teacher, whole, z, conditions).gradient
    spread = [value.std((1, 2, 3)) for value in (x0, told.predictions["conditional"].x0, guided.x0)]
    torch.testing.assert_close(spread[0], spread[1], atol=1e-5, rtol=1e-4)
    assert float((spread[2] - spread[1]).abs().min()) > 0.01
    half = z - run(teacher, options, z, conditions).gradient
    torch.testing.assert_close(half, (x0 + guided.x0) / 2, atol=1e-5, rtol=1e-5)


def wide_mixture() -> Mixture:
    """Three classes of two components each in 16 dimensions."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(6, 1, 4, 4, generator=generator, dtype=torch.float64)
    return Mixture(
        means, torch.full_like(means, 0.5), torch.full((6,), 1 / 6, dtype=torch.float64), tuple("aabbcc")
    )


def run(
    teacher: ScoreModel, options: ObjectiveOptions, z: Tensor, conditions: PromptConditionings, **more: Tensor
) -> DistillationOutput:
    return ScoreDistillation(teacher, options, decode=lambda x: x)(
        z, conditions, 0.0, torch.Generator().manual_seed(0), **more
    )


def test_perp_neg_by_hand(schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z, conditions = torch.zeros(2, 1, 4, 4, dtype=torch.float64), states(teacher, 2)
    told = run(teacher, load("sds_perp_neg"), z, conditions)
    free, bound, other = (
        told.predictions[name].eps for name in ("unconditional", "conditional", "other_view_0")
    )
    extrapolate, away = bound - free, other - free
    flat = (
        away
        - (away * extrapolate).sum((1, 2, 3), keepdim=True)
        / extrapolate.square().sum((1, 2, 3), keepdim=True)
        * extrapolate
    )
    assert (flat * extrapolate).sum((1, 2, 3)).abs().max() < 1e-6 < flat.abs().max()
    guided = free + 10 * (extrapolate - 0.5 * 2 * flat)  # both other views are class b here
    torch.testing.assert_close(
        told.gradient, schedule.sigma(told.t).double() ** 2 * (guided - told.noise), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("guidance", [1.0, 10.0])
def test_contrast_by_hand(guidance: float, schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z, conditions = torch.zeros(2, 1, 4, 4, dtype=torch.float64), states(teacher, 2)
    options = replace(
        load("sds"), terms=(Term("teacher", guidance=guidance, contrast=3.0), Term("noise", -1.0))
    )
    told = run(teacher, options, z, conditions)
    bound, other = (
        told.predictions[name].eps for name in ("conditional", "other_view_0")
    )  # both other views are class b here
    free = told.predictions["unconditional"].eps if guidance > 1 else bound
    wanted = free + guidance * (bound - free) + 3 * (bound - other)
    assert (bound - other).abs().max() > 1e-3
    torch.testing.assert_close(
        told.gradient, schedule.sigma(told.t).double() ** 2 * (wanted - told.noise), atol=1e-5, rtol=1e-4
    )
    with pytest.raises(UserError, match="a term of the noise takes no"):
        Term("noise", contrast=1.0)


def test_dds_of_an_image_with_its_own_source_is_nothing(schedule: NoiseSchedule) -> None:
    """The same image and prompt cancel for every noise; another prompt leaves the difference of two SDS gradients."""
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z, conditions = (
        torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        states(teacher, 2),
    )
    same = PromptConditionings({**conditions.states, "reference": conditions.states["conditional"]})
    assert float(run(teacher, load("dds"), z, same, reference=z).gradient.abs().max()) < 1e-12
    told = run(teacher, load("dds"), z, conditions, reference=z + 1).gradient
    sds = replace(load("sds"), terms=(Term("teacher", guidance=7.5), Term("noise", -1.0)))
    source = PromptConditionings(
        {**conditions.states, "conditional": conditions.states["reference"].expand(2, -1, -1)}
    )
    difference = run(teacher, sds, z, conditions).gradient - run(teacher, sds, z + 1, source).gradient
    torch.testing.assert_close(told, difference)
    with pytest.raises(UserError, match="give the reference's latents"):
        run(teacher, load("dds"), z, conditions)


def test_hifa_pulls_the_image_too(schedule: NoiseSchedule) -> None:
    """lambda w (alpha / sigma) (x - decoded x0), over the batch, through a decoder that doubles."""
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z, conditions = torch.zeros(2, 1, 4, 4, dtype=torch.float64), states(teacher, 2)
    images = torch.ones(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = ScoreDistillation(teacher, load("hifa"), decode=lambda latents: 2 * latents)
    told = loss(z, conditions, 0.0, torch.Generator().manual_seed(0), images=images)
    told.loss.backward()
    x0 = told.predictions["unconditional"].extrapolate(told.predictions["conditional"], 10.0).x0
    alpha, sigma = schedule.alpha(told.t).double(), schedule.sigma(told.t).double()
    torch.testing.assert_close(
        images.grad, 0.01 * sigma**2 * alpha / sigma * (1 - 2 * x0) / 2, atol=1e-6, rtol=1e-5
    )


def test_pixels_have_a_guidance_of_their_own(schedule: NoiseSchedule) -> None:
    """sds_pixels: the latents' gradient is that of SDS at 20, the pixels are pulled to x0 at 3, from the same two predictions."""
    teacher = NFECounter(MixtureTeacher(wide_mixture(), schedule))
    z, conditions = (
        torch.zeros(2, 1, 4, 4, dtype=torch.float64),
        states(cast(MixtureTeacher, teacher.model), 2),
    )
    images = torch.ones(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = ScoreDistillation(teacher, load("sds_pixels"), decode=lambda latents: latents)
    told = loss(z, conditions, 0.0, torch.Generator().manual_seed(0), images=images)
    told.loss.backward()
    plain = ScoreDistillation(teacher, load("sds"))(z, conditions, 0.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(told.gradient, plain.gradient)
    x0 = told.predictions["unconditional"].extrapolate(told.predictions["conditional"], 3.0).x0
    alpha, sigma = schedule.alpha(told.t).double(), schedule.sigma(told.t).double()
    torch.testing.assert_close(images.grad, 10.0 * sigma * alpha * (1 - x0) / 2, atol=1e-6, rtol=1e-5)
    assert teacher.calls == 2


def test_pixels_alone_are_predicted_too(schedule: NoiseSchedule) -> None:
    """A coefficient of 0 leaves the latents alone; the residual in pixels still asks the teacher, and counts."""
    options = ObjectiveOptions((Term("teacher", 0.0, guidance=7.5), Term("noise", 0.0)), image=1.0)
    assert options.cost() == 2
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    images = torch.ones(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = ScoreDistillation(teacher, options, decode=lambda latents: latents)
    told = loss(z, states(teacher, 2), 0.0, torch.Generator().manual_seed(0), images=images)
    told.loss.backward()
    assert (
        float(told.gradient.abs().max()) == 0
        and images.grad is not None
        and float(images.grad.abs().min()) > 0
    )


@pytest.mark.parametrize("progress", [0.0, 1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_costs_what_it_says(name: str, progress: float, schedule: NoiseSchedule) -> None:
    """One batched call of the teacher a step, and one a step of a path; F as `cost` counts it, critic updates apart."""
    plain = MixtureTeacher(wide_mixture(), schedule)
    teacher, critic = NFECounter(plain), NFECounter(plain)
    options = load(name, None)
    loss = ScoreDistillation(teacher, options, critic if options.needs_critic else None, decode=lambda x: x)
    z = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    loss(z, states(plain, 3), progress, torch.Generator().manual_seed(0), reference=z)
    updates = 0 if options.critic is None else 3 * options.critic.updates
    assert teacher.nfe + critic.nfe == 3 * (options.cost(progress) - updates)
    path = options.noise.steps + options.noise.has_gap if options.noise.kind == "inversion" else 0
    assert (teacher.calls, critic.calls) == (1 + path, int(options.needs_critic))


def test_a_loss_that_costs_something_else_stops(
    schedule: NoiseSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = MixtureTeacher(wide_mixture(), schedule)
    monkeypatch.setattr(LossComponent, "forwards", lambda part, progress: 3)
    with pytest.raises(RuntimeError, match=r"took 2.0 forward passes a sample where it states 3"):
        run(teacher, load("sds"), torch.zeros(3, 1, 4, 4, dtype=torch.float64), states(teacher, 3))


def test_stated_costs() -> None:
    """Facts of the field: SDS is a guided pair, VSD two forwards more and a critic's step, SDI pays for its path."""
    assert [
        load(name).cost() for name in ("sds", "csd", "ism", "sdi", "vsd", "diff_instruct", "sds_perp_neg")
    ] == [2, 2, 8, 22, 6, 5, 4]
    assert [load("sds_bridge").cost(progress) for progress in (0.0, 1.0)] == [2, 2]


def test_guidance_one_never_asks_the_unconditional(schedule: NoiseSchedule) -> None:
    teacher = NFECounter(MixtureTeacher(wide_mixture(), schedule))
    plain = replace(load("sds"), terms=(Term("teacher"), Term("noise", -1.0)))
    told = run(
        teacher,
        plain,
        torch.zeros(3, 1, 4, 4, dtype=torch.float64),
        states(cast(MixtureTeacher, teacher.model), 3),
    )
    assert teacher.nfe == 3 and set(told.predictions) == {"conditional"}


def test_identities(schedule: NoiseSchedule) -> None:
    """Of the same draws and terms: SJC is SDS / sigma^2, recon without rescale SDS with sigma / alpha, SDS = its conditional part + CSD."""
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z, conditions = (
        torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        states(teacher, 3),
    )
    guided = (Term("teacher", guidance=10.0), Term("noise", -1.0))
    sds, sjc = (run(teacher, replace(load(name), terms=guided), z, conditions) for name in ("sds", "sjc"))
    csd = run(teacher, load("csd"), z, conditions)
    alpha, sigma = schedule.alpha(sds.t).double(), schedule.sigma(sds.t).double()
    torch.testing.assert_close(sjc.gradient * sigma**2, sds.gradient)
    options = load("recon")
    recon = run(
        teacher,
        replace(options, terms=(replace(options.terms[0], rescale=0.0), options.terms[1])),
        z,
        conditions,
    )
    torch.testing.assert_close(recon.gradient, sds.gradient / sigma**2 * sigma / alpha)
    bound = run(teacher, replace(load("sds"), terms=(Term("teacher"), Term("noise", -1.0))), z, conditions)
    torch.testing.assert_close(sds.gradient, bound.gradient + 9 * csd.gradient)


def kl(theta: float, std: float, share: float, schedule: NoiseSchedule) -> float:
    """KL(q_t | p_t) of N(theta, std^2) against class a, by quadrature on a fine grid, without any score."""
    alpha, sigma = levels(schedule, share)
    x = np.linspace(-8, 8, 40_001)
    v = alpha**2 * std**2 + sigma**2
    q = np.exp(-0.5 * (x - alpha * theta) ** 2 / v) / math.sqrt(2 * math.pi * v)
    p = np.zeros_like(x)
    for w, m, s in ((0.6, -1.0, 0.3), (0.4, 0.4, 0.15)):
        u = alpha**2 * s**2 + sigma**2
        p += w * np.exp(-0.5 * (x - alpha * m) ** 2 / u) / math.sqrt(2 * math.pi * u)
    return float(np.trapezoid(q * (np.log(q + 1e-300) - np.log(p + 1e-300)), x))


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_diff_instruct_with_the_exact_critic_is_the_gradient_of_kl(
    share: float, schedule: NoiseSchedule
) -> None:
    """z = theta + std n: with the generator's own score as critic, (alpha / sigma) E[g] = d KL(q_t | p_t) / d theta."""
    theta, std, count, step = 0.1, 0.4, 200_000, 1e-4
    slope = (kl(theta + step, std, share, schedule) - kl(theta - step, std, share, schedule)) / (2 * step)
    own = torch.tensor([[[[theta]]]], dtype=torch.float64)
    exact = MixtureTeacher(
        Mixture(own, torch.full_like(own, std), torch.ones(1, dtype=torch.float64), ("own",)), schedule
    )
    teacher = MixtureTeacher(mixture(), schedule)
    generator = torch.Generator().manual_seed(0)
    z = theta + std * torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)
    critic = Switched(exact, exact.encode_text(["own"]))
    loss = ScoreDistillation(teacher, load("diff_instruct", share), critic)
    told = loss(z, states(teacher, count), 0.0, generator).gradient
    alpha, sigma = levels(schedule, share)
    error = alpha / sigma * float(told.std()) / count**0.5
    assert abs(alpha / sigma * float(told.mean()) - slope) < 4 * error
    assert abs(slope) > 30 * error


def test_a_critic_that_is_the_teacher_leaves_nothing(schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z, conditions = (
        torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        states(teacher, 4),
    )
    told = ScoreDistillation(teacher, load("diff_instruct"), teacher)(
        z, conditions, 0.0, torch.Generator().manual_seed(0)
    )
    assert float(told.gradient.abs().max()) == 0


def test_two_parts_have_their_own_times_and_share_one_call(schedule: NoiseSchedule) -> None:
    """Decoupled laws of t: the sum of what each part alone would give."""
    teacher = NFECounter(MixtureTeacher(wide_mixture(), schedule))
    z, conditions = (
        torch.zeros(3, 1, 4, 4, dtype=torch.float64),
        states(cast(MixtureTeacher, teacher.model), 3),
    )
    fixed = NoiseSource("fixed", seed=5)
    early, late = (
        LossComponent((Term("teacher", c),), "one", TimestepSampler(s, (s, s)), fixed)
        for c, s in ((2.0, 0.2), (-1.0, 0.8))
    )
    both = run(teacher, ObjectiveOptions(early.terms, "one", early.time, fixed, second=late), z, conditions)
    assert teacher.calls == 1 and teacher.nfe == 6
    alone = [
        run(teacher, ObjectiveOptions(part.terms, "one", part.time, fixed), z, conditions).gradient
        for part in (early, late)
    ]
    torch.testing.assert_close(both.gradient, alone[0] + alone[1])
    assert len(both.terms) == 2


def test_fixed_noise_stays_and_fresh_does_not(schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z, conditions, generator = torch.zeros(2, 1, 4, 4), states(teacher, 2), torch.Generator().manual_seed(0)
    for kind, same in (("fixed", True), ("fresh", False)):
        loss = ScoreDistillation(teacher, replace(load("sds"), noise=NoiseSource(kind, seed=1)))  # type: ignore[arg-type]
        noises = [loss(z, conditions, 0.0, generator).noise for _ in range(2)]
        assert torch.equal(*noises) is same


def test_normalised_samples_weigh_alike(schedule: NoiseSchedule) -> None:
    """Each sample's g divided by its mean |z - x0|: with w = sigma / alpha and no critic that is g / mean |g|."""
    teacher = MixtureTeacher(wide_mixture(), schedule)
    z = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)[:, None, None, None].expand(3, 1, 4, 4)
    options = replace(
        load("sds"), terms=(Term("teacher"), Term("noise", -1.0)), weight="sigma_over_alpha", normalise=True
    )
    told = run(teacher, options, z, states(teacher, 3)).gradient
    torch.testing.assert_close(
        told.abs().mean((1, 2, 3)), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=1e-5
    )


def test_ramps_and_windows() -> None:
    ramp = LinearSchedule(0.0, -1.0, 0.2, 0.6)
    assert [ramp.at(p) for p in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0, 0, -0.5, -1, -1])
    part = LossComponent((Term("teacher", ramp, "negative"), Term("teacher")))
    assert part.asked("teacher", 0.0) == (
        ("now", "conditional"),
    )  # a term that counts nothing is not evaluated
    assert len(part.asked("teacher", 0.5)) == 2


def test_terms_count_in_their_times_only(schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(wide_mixture(), schedule)
    options = ObjectiveOptions((Term("teacher", times=(0.2, 1.0)),), "one", TimestepSampler(0.0, (1.0, 1.0)))
    told = run(teacher, options, torch.zeros(200, 1, 4, 4, dtype=torch.float64), states(teacher, 200))
    size = told.gradient.abs().amax((1, 2, 3))
    assert torch.equal(size > 0, told.t >= 200) and 20 < int((told.t < 200).sum()) < 60


@pytest.mark.parametrize(
    "given, words",
    [
        ({"terms": [{"predict": "noise", "guidance": 3.0}]}, "takes no guidance"),
        ({"terms": [{"predict": "teacher", "at": "earlier"}]}, "give noise.kind=inversion and a noise.gap"),
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


def test_what_a_driver_must_give(schedule: NoiseSchedule) -> None:
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
    """Two time scales on Gaussian means: m' = -eta c f, f' = rho (m - f) swings past the teacher's mean iff rho < 4 eta c."""
    share = 0.5
    alpha, sigma = levels(schedule, share)
    slope = (
        sigma * alpha / (alpha**2 * 0.25 + sigma**2)
    )  # c: g per unit of the critic's mean, the teacher's being 0
    mean, belief, eta = torch.ones(1, 1, 1, 1), 1.0, 0.02
    teacher, conditions = gaussian(0.5), PromptConditionings({"conditional": torch.zeros(1, 1, 1)})
    lowest = 1.0
    for _ in range(1500):
        critic = Switched(gaussian(0.5), torch.full((1, 1, 1), belief))
        g = ScoreDistillation(teacher, load("diff_instruct", share), critic)(
            mean, conditions, 0.0, torch.Generator()
        ).gradient
        assert float(g) == pytest.approx(slope * belief, abs=1e-5)
        belief += ratio * eta * slope * (float(mean) - belief)
        mean = mean - eta * g
        lowest = min(lowest, float(mean))
    assert (lowest < -1e-3) is overshoots
