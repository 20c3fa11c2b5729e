"""The methods of distillation against arithmetic: what each loss is, whom it moves, and where it leaves an exact student alone."""

import math
from collections.abc import Callable

import pytest
import torch
import yaml
from command_line import ROOT
from torch import Tensor

from distill.core.noise import NoiseSchedule
from distill.core.score import Prediction
from distill.evaluation.metrics import kernel_distance, precision_recall
from distill.objectives.algebra import PromptConditionings, ScoreDistillation
from distill.objectives.critic import Critic
from distill.objectives.options import CriticOptions, ObjectiveOptions, Term, TimestepSampler
from distill.one_step.adversarial import (
    WEIGHTS,
    Adversary,
    Divergence,
    GanOptions,
    bottleneck,
    divergence_weight,
)
from distill.one_step.critic_diagnostics import LagOptions, adapted, critic_lag
from distill.one_step.methods.matching import Batch, DistributionMatching
from distill.one_step.methods.sid import identity_loss
from distill.one_step.methods.trajectory import ddim, ddim_target, grid_times
from distill.one_step.monitor import Monitor, MonitorOptions
from distill.one_step.student import Student, StudentOptions
from distill.one_step.trainer import MethodOptions
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.teacher.latent import Teacher
from distill.teacher.mixture import Mixture, MixtureTeacher, ring

METHODS = ROOT / "configs" / "method"
FUNCTIONS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "softened_reverse_kl": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
}


def batch_of(teacher: Teacher, count: int = 4) -> Batch:
    source = torch.Generator().manual_seed(0)
    shape = (count, *teacher.latent_shape)
    real, noise = (torch.randn(shape, generator=source) for _ in range(2))
    return Batch(teacher.encode_text(["a red cube"] * count), teacher.encode_text([""]), real, noise)


def normal(mean: float, std: float, schedule: NoiseSchedule) -> MixtureTeacher:
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    return MixtureTeacher(
        Mixture(mean * one, std * one, torch.ones(1, dtype=torch.float64), ("x",)), schedule
    )


def test_dmd_is_the_gradient_of_kl(schedule: NoiseSchedule) -> None:
    """An affine student b + a z has an exact critic; DMD's mean gradient on a and b is sigma / alpha times KL(q_t | p_t)'s, by differences.

    The factor: the terms are eps, sigma times scores, where the KL's gradient is alpha times the scores' difference (DMD, eq. 3 to 5).
    """
    both = MixtureTeacher(ring(modes=2, radius=1.0, std=0.4, classes=1), schedule)
    means = both.mixture.means[:, :1]
    teacher = MixtureTeacher(
        Mixture(means, torch.full_like(means, 0.4), both.mixture.weights, ("c0", "c0")), schedule
    )
    t, a, b = 400, torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    alpha, sigma = float(schedule.alpha(torch.tensor([t]))), float(schedule.sigma(torch.tensor([t])))
    state = teacher.encode_text([""])
    x = torch.linspace(-8, 8, 8001, dtype=torch.float64)[:, None, None, None]
    log_p = teacher.log_density(x, torch.full((len(x),), t), state.expand(len(x), -1, -1))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        variance = alpha**2 * a**2 + sigma**2
        log_q = -0.5 * ((x.flatten() - alpha * b) ** 2 / variance + variance.log() + math.log(2 * math.pi))
        return torch.trapezoid(log_q.exp() * (log_q - log_p), x.flatten())

    step = 1e-4
    wanted = [
        (kl(a + step, b) - kl(a - step, b)) / (2 * step),
        (kl(a, b + step) - kl(a, b - step)) / (2 * step),
    ]
    share = t / (schedule.num_train_timesteps - 1)
    terms = (Term("teacher"), Term("critic", -1.0))
    objective = ObjectiveOptions(
        terms, weight="one", time=TimestepSampler(share, (share, share)), critic=CriticOptions()
    )
    critic = normal(float(b), float(a), schedule)

    class Told(MixtureTeacher):
        """The critic's condition has one weight where the teacher's has two."""

        def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
            return super().predict(x_t, t, condition[..., :1] * 0 + 1)

    loss = ScoreDistillation(teacher, objective, Told(critic.mixture, schedule))
    z = torch.randn(200_000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a.requires_grad_(), b.requires_grad_()
    conditions = PromptConditionings({"conditional": state, "unconditional": state})
    loss(b + a * z, conditions, 0.0, torch.Generator().manual_seed(1)).loss.backward()
    got = [float(value.grad) * alpha / sigma for value in (a, b) if value.grad is not None]
    assert (
        got == pytest.approx([float(value) for value in wanted], abs=0.006)
        and min(abs(value) for value in got) > 0.05
    )


def test_a_critic_that_is_the_teacher_leaves_nothing(tiny_teacher: Teacher) -> None:
    for name in ("dmd2", "diff_instruct"):
        given = build(
            MethodOptions, {**yaml.safe_load((METHODS / f"{name}.yaml").read_text()), "gan": None}, name
        )
        assert given.objective is not None
        unguided = tuple(Term(term.predict, term.coefficient, term.prompt) for term in given.objective.terms)
        objective = ObjectiveOptions(
            unguided, given.objective.weight, given.objective.time, critic=given.objective.critic
        )
        batch = batch_of(tiny_teacher)
        method = DistributionMatching(tiny_teacher, objective, None, "reverse_kl", None, batch)
        outcome = method.loss(
            Student.of(tiny_teacher, StudentOptions()), batch, 0.0, torch.Generator().manual_seed(0)
        )
        assert float(outcome.figures["g"]) < 1e-5, name


def test_weights_are_second_derivatives() -> None:
    """h(r) = r^2 f''(r), by central differences in float64."""
    r = torch.tensor([0.2, 0.9, 1.0, 3.0, 9.0], dtype=torch.float64)
    step = 1e-4
    for name, f in FUNCTIONS.items():
        second = (f(r + step) - 2 * f(r) + f(r - step)) / step**2
        torch.testing.assert_close(WEIGHTS[name](r), r**2 * second, atol=1e-4, rtol=1e-4)
    assert set(FUNCTIONS) == set(WEIGHTS)
    logits = torch.tensor([-99.0, math.log(2.0), 99.0])
    torch.testing.assert_close(
        divergence_weight("forward_kl", logits).flatten(), torch.tensor([0.1, 2.0, 20.0])
    )


def test_sid_by_hand(schedule: NoiseSchedule) -> None:
    """Both forms of the identity agree; E[(f - f_psi) . (f_psi - x_g)] = 0 for the exact critic, which leaves (1 - alpha) |f - f_psi|^2."""
    count, alpha = 100_000, 1.2
    source = torch.Generator().manual_seed(0)
    z = 0.5 + 0.7 * torch.randn(count, 1, 1, 1, generator=source, dtype=torch.float64)
    t = torch.full((count,), 500)
    x_t = schedule.add_noise(z, torch.randn(z.shape, generator=source, dtype=torch.float64), t)
    weight = torch.ones(count, 1, 1, dtype=torch.float64)
    real, fake = (normal(m, s, schedule).predict(x_t, t, weight) for m, s in ((0.0, 1.0), (0.5, 0.7)))
    apart = real.x0 - fake.x0
    scale = (z - real.x0).abs()
    paper = ((1 - alpha) * apart.square() + apart * (fake.x0 - z)) / scale.clamp_min(1e-6)
    torch.testing.assert_close(identity_loss(real, fake, z, alpha), paper.mean(), rtol=1e-6, atol=1e-9)
    crossed = apart * (fake.x0 - z)
    assert abs(float(crossed.mean())) < 4 * float(crossed.std()) / count**0.5


def test_straight_target_lands_where_it_should(tiny_teacher: Teacher) -> None:
    student = Student.of(tiny_teacher, StudentOptions(level=None))
    x_t = torch.randn(3, *tiny_teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    arrived = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    t, end = torch.tensor([999, 700, 300]), torch.tensor([500, -1, 100])
    x0 = ddim_target(student, x_t, arrived, t, end)
    alpha, sigma = tiny_teacher.schedule.alpha(t), tiny_teacher.schedule.sigma(t)
    told = Prediction(x0, (x_t - alpha * x0) / sigma, alpha, sigma)
    torch.testing.assert_close(ddim(tiny_teacher, told, end), arrived, atol=1e-4, rtol=1e-4)
    assert grid_times(999, 4).tolist() == [-1, 249, 499, 749, 999]


def test_the_adversary_moves_whom_it_should(tiny_teacher: Teacher) -> None:
    batch = batch_of(tiny_teacher)
    critic = Critic(tiny_teacher, CriticOptions("copy"))
    adversary = Adversary(critic, batch.real.shape[1:], batch.empty, GanOptions())
    generated = batch.noise.clone().requires_grad_()
    adversary.generator_loss(generated, batch.states, torch.Generator().manual_seed(0)).backward()
    assert generated.grad is not None and float(generated.grad.abs().sum()) > 0
    assert all(p.grad is None for module in (critic.unet, adversary.head) for p in module.parameters())
    t = torch.full((4,), 300)
    middle = bottleneck(critic.unet, batch.noise, t, batch.states)
    adversary.critic_loss(middle, batch.real, batch.states, torch.Generator().manual_seed(0)).backward()
    moved = {
        name
        for name, p in critic.unet.named_parameters()
        if p.grad is not None and float(p.grad.abs().sum()) > 0
    }
    assert any("down_blocks" in name for name in moved) and not any("up_blocks" in name for name in moved)
    assert adversary.head.out.weight.grad is not None


def test_the_student_is_told_at_the_lower_levels_only(
    tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(tiny_teacher)
    adversary = Adversary(
        Critic(tiny_teacher, CriticOptions("copy")), batch.real.shape[1:], batch.empty, GanOptions(high=0.2)
    )
    asked: list[Tensor] = []
    answer = adversary.logits
    monkeypatch.setattr(adversary, "logits", lambda x_t, t, states: asked.append(t) or answer(x_t, t, states))
    source = torch.Generator().manual_seed(0)
    for _ in range(20):
        adversary.generator_loss(batch.noise, batch.states, source)
    told = torch.cat(asked)
    assert int(told.max()) < 200 and int(told.max()) > 150
    asked.clear()
    for _ in range(20):
        middle = bottleneck(
            adversary.critic.unet, batch.noise, torch.full((len(batch.noise),), 300), batch.states
        )
        adversary.critic_loss(middle, batch.real, batch.states, source)
    assert int(torch.cat(asked).max()) > 500  # the head itself learns at every level
    with pytest.raises(UserError, match=r"gan.high is 0: a share"):
        GanOptions(high=0)


def test_a_critic_that_has_caught_up_has_no_lag(schedule: NoiseSchedule) -> None:
    """The exact score of the student's points scores 0 within noise; one of where they were before does not."""
    source = torch.Generator().manual_seed(0)
    points = 0.5 + 0.3 * torch.randn(20_000, 1, 1, 1, generator=source, dtype=torch.float64)
    states = torch.ones(len(points), 1, 1, dtype=torch.float64)
    teacher = normal(0.0, 1.0, schedule)
    lags = {}
    for name, mean in (("now", 0.5), ("before", 0.3)):
        told = critic_lag(
            normal(mean, 0.3, schedule),
            points,
            states,
            torch.Generator().manual_seed(1),
            {"teacher": teacher},
        )
        assert set(told) == {"x_t", "itself", "teacher"}
        lags[name] = max(abs(value) for value in told.values())
    assert lags["now"] < 0.03 < 0.1 < lags["before"]
    options = LagOptions(adapt=True, bounds=(1, 3))
    assert [adapted(2, lag, options) for lag in (0.5, 0.02, 0.0)] == [3, 2, 1] and adapted(
        3, 0.5, options
    ) == 3


def test_what_counts_as_diverged() -> None:
    monitor = Monitor(None, None, None, None, MonitorOptions(worse=4.0, collapse=0.2), {})  # type: ignore[arg-type]
    assert (
        monitor.judge({"frechet": 10.0, "spread": 1.0, "saturation": 1.0}) is None
        and monitor.judge({"frechet": 2.0, "spread": 3.0, "saturation": 1.6}) is None
    )
    assert monitor.judge({"frechet": 7.9, "spread": 0.7, "saturation": 1.4}) is None
    assert "Frechet distance rose from 2 to 8.1" in str(monitor.judge({"frechet": 8.1, "spread": 3.0}))
    assert "fell from 3 to 0.5" in str(monitor.judge({"frechet": 2.0, "spread": 0.5}))
    assert "not finite" in str(monitor.judge({"frechet": math.nan, "spread": 1.0}))
    assert monitor.alarms == [
        "samples are 1.60 times as saturated as real ones: lower the teacher's guidance"
    ]
    again = Monitor(None, None, None, None, MonitorOptions(), {})  # type: ignore[arg-type]
    again.load_state_dict(monitor.state_dict())
    assert again.best == {"frechet": 2.0, "spread": 3.0} and again.alarms == monitor.alarms


def test_methods_that_make_no_sense_are_refused() -> None:
    objective = {"terms": [{"predict": "teacher"}, {"predict": "critic", "coefficient": -1.0}], "critic": {}}
    for values, said in (
        ({}, "given are none"),
        ({"objective": objective, "consistency": {}}, "given are objective, consistency"),
        ({"objective": {"terms": [{"predict": "teacher"}]}}, "needs a critic"),
        ({"second_order": {}}, "second_order needs a critic"),
        ({"consistency": {}, "gan": {}}, "belong to a method with an objective"),
        ({"objective": objective, "divergence": "forward_kl"}, "give method.gan"),
        ({"progressive": {"start": 3}}, "a power of two"),
    ):
        with pytest.raises(UserError, match=said):
            build(MethodOptions, values)


def test_kernel_distance_by_hand() -> None:
    """Two pairs of points on a line: (x y + 1)^3 summed by hand, without the diagonal within a set."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    within = 1 + 27.0  # k(0, 1) and k(1, 2)
    across = (1 + 1 + 8 + 27) / 4
    assert kernel_distance(a, b, subsets=1) == (pytest.approx(within - 2 * across), 0.0)
    source = torch.Generator().manual_seed(0)
    c, d = (torch.randn(500, 4, generator=source) for _ in range(2))
    mean, spread = kernel_distance(c, d, subsets=20, size=100)
    assert abs(mean) < spread < 0.2


def test_precision_and_recall_by_hand() -> None:
    """Real points at 0, 1, 2, 3; made ones at .5 and 50: half of them are covered; with k = 1 each real point's ball has radius 1."""
    real, made = torch.arange(4.0)[:, None], torch.tensor([[0.5], [50.0]])
    precision, recall = precision_recall(real, made, k=1)
    assert (precision, recall) == (
        0.5,
        1.0,
    )  # the made points' balls are 49.5 wide: they cover all that is real
    assert precision_recall(real, real, k=1) == (1.0, 1.0)
    with pytest.raises(UserError, match="need more than 3"):
        precision_recall(real, made)
