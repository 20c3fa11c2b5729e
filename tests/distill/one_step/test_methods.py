"""The methods against arithmetic: each loss, which networks its gradient reaches, and its fixed points."""

import math
from collections.abc import Callable

import pytest
import torch
import yaml
from command_line import ROOT
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule
from distill.core.score import Guided, Prediction, ScoreModel
from distill.evaluation.metrics import kernel_distance, moments, precision_recall
from distill.objectives.algebra import ScoreDistillation
from distill.objectives.critic import Critic
from distill.objectives.options import CriticOptions, ObjectiveOptions, Term, TimestepSampler
from distill.objectives.prompts import PromptConditionings
from distill.one_step.adversarial import WEIGHTS, Adversary, Divergence, GanOptions, divergence_weight
from distill.one_step.critic_diagnostics import CriticDiagnosticsOptions, adapt_updates, critic_error
from distill.one_step.methods.base import Batch, MethodContext, MethodOptions, MicroBatch, Outcome
from distill.one_step.methods.sid import SiDOptions, identity_loss
from distill.one_step.methods.trajectories import ddim_step, ddim_target, grid_times
from distill.one_step.monitor import Monitor, MonitorOptions
from distill.one_step.student import Student, StudentOptions
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.teacher.latent import LatentDiffusionTeacher
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


def batch_of(teacher: LatentDiffusionTeacher, count: int = 4) -> Batch:
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
    """An affine student b + a z has an exact critic; DMD's mean gradient on a and b is sigma / alpha that of
    KL(q_t | p_t).

    The factor: the terms are eps, sigma times scores; the KL's gradient is alpha times the difference of
    scores (DMD, eq. 3 to 5).
    """
    pair = MixtureTeacher(ring(modes=2, radius=1.0, std=0.4, classes=1), schedule)
    means = pair.mixture.means[:, :1]
    teacher = MixtureTeacher(
        Mixture(means, torch.full_like(means, 0.4), pair.mixture.weights, ("c0", "c0")), schedule
    )
    t, a, b = 400, torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    alpha, sigma = float(schedule.alpha(torch.tensor([t]))), float(schedule.sigma(torch.tensor([t])))
    conditioning = teacher.encode_text([""])
    x = torch.linspace(-8, 8, 8001, dtype=torch.float64)[:, None, None, None]
    log_p = teacher.log_density(x, torch.full((len(x),), t), conditioning.expand(len(x)))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        variance = alpha**2 * a**2 + sigma**2
        log_q = -0.5 * ((x.flatten() - alpha * b) ** 2 / variance + variance.log() + math.log(2 * math.pi))
        return torch.trapezoid(log_q.exp() * (log_q - log_p), x.flatten())

    step = 1e-4
    expected = [
        (kl(a + step, b) - kl(a - step, b)) / (2 * step),
        (kl(a, b + step) - kl(a, b - step)) / (2 * step),
    ]
    fraction = t / (schedule.num_train_timesteps - 1)
    terms = (Term("teacher"), Term("critic", -1.0))
    objective = ObjectiveOptions(
        terms, weight="one", time=TimestepSampler(fraction, (fraction, fraction)), critic=CriticOptions()
    )
    critic = normal(float(b), float(a), schedule)

    class SingleWeight(ScoreModel):
        """The critic's embedding has one weight where the teacher's has two."""

        def __init__(self) -> None:
            self.schedule = schedule

        def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
            return critic.predict(x_t, t, conditioning.apply(lambda value: value[..., :1] * 0 + 1))

    loss = ScoreDistillation(teacher, objective, SingleWeight())
    z = torch.randn(200_000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a.requires_grad_(), b.requires_grad_()
    prompts = PromptConditionings({"conditional": conditioning, "unconditional": conditioning})
    loss(b + a * z, prompts, 0.0, torch.Generator().manual_seed(1)).loss.backward()
    got = [float(value.grad) * alpha / sigma for value in (a, b) if value.grad is not None]
    assert (
        got == pytest.approx([float(value) for value in expected], abs=0.006)
        and min(abs(value) for value in got) > 0.05
    )


def test_a_critic_equal_to_the_teacher_gives_zero(tiny_teacher: LatentDiffusionTeacher) -> None:
    for name in ("dmd2", "diff_instruct"):
        values = {**yaml.safe_load((METHODS / f"{name}.yaml").read_text()), "gan": None}
        options = build(MethodOptions, values, name).unguided(1e-3, (1.0, 1.0))
        batch, student = batch_of(tiny_teacher), Student.from_teacher(tiny_teacher, StudentOptions())
        method = options.build(MethodContext(tiny_teacher, student, batch))
        outcome = method.loss(student, batch, 0.0, torch.Generator().manual_seed(0))
        assert float(outcome.metrics["g"]) < 1e-5, name


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
    """Both forms agree; E[(f - f_psi) . (f_psi - x_g)] = 0 for the exact critic leaves (1 - alpha) |f -
    f_psi|^2.
    """
    count, alpha = 100_000, 1.2
    source = torch.Generator().manual_seed(0)
    z = 0.5 + 0.7 * torch.randn(count, 1, 1, 1, generator=source, dtype=torch.float64)
    t = torch.full((count,), 500)
    x_t = schedule.add_noise(z, torch.randn(z.shape, generator=source, dtype=torch.float64), t)
    weight = Conditioning(torch.ones(count, 1, 1, dtype=torch.float64))
    real, fake = (normal(m, s, schedule).predict(x_t, t, weight) for m, s in ((0.0, 1.0), (0.5, 0.7)))
    difference = real.x0 - fake.x0
    scale = (z - real.x0).abs()
    paper = ((1 - alpha) * difference.square() + difference * (fake.x0 - z)) / scale.clamp_min(1e-6)
    torch.testing.assert_close(identity_loss(real, fake, z, alpha), paper.mean(), rtol=1e-6, atol=1e-9)
    crossed = difference * (fake.x0 - z)
    assert abs(float(crossed.mean())) < 4 * float(crossed.std()) / count**0.5


def test_a_guided_critic_by_hand(tiny_teacher: LatentDiffusionTeacher) -> None:
    """SiD-LSG's critic loss is the error of the guided eps; without captions both halves are one."""
    batch = batch_of(tiny_teacher)
    student = Student.from_teacher(tiny_teacher, StudentOptions())
    values = {"critic_guidance": 3.0, "caption_dropout": 1.0}
    losses = []
    for changes in (values, values | {"critic_guidance": 1.0}, values | {"caption_dropout": 0.0}):
        method = SiDOptions(**changes).build(MethodContext(tiny_teacher, student, batch))
        outcome = Outcome(torch.zeros(()), batch.real, {})
        part = MicroBatch(outcome, batch, torch.Generator().manual_seed(0))
        losses.append(method.critic_loss(part).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] != pytest.approx(losses[2], rel=1e-4)

    source = torch.Generator().manual_seed(0)
    t = torch.randint(tiny_teacher.schedule.num_train_timesteps, (4,), generator=source)
    noise = torch.randn(batch.real.shape, generator=source)
    guided = Guided(tiny_teacher, batch.uncond, 3.0)
    eps = guided.predict(tiny_teacher.schedule.add_noise(batch.real, noise, t), t, batch.conditioning).eps
    assert losses[2] == pytest.approx(float((eps - noise).square().mean()), rel=1e-4)


def test_ddim_target_inverts_a_ddim_step(tiny_teacher: LatentDiffusionTeacher) -> None:
    student = Student.from_teacher(tiny_teacher, StudentOptions(sigma_max=None))
    x_t = torch.randn(3, *tiny_teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    x_s = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    t, end = torch.tensor([999, 700, 300]), torch.tensor([500, -1, 100])
    x0 = ddim_target(student.denoiser, x_t, x_s, t, end)
    alpha, sigma = tiny_teacher.schedule.alpha(t), tiny_teacher.schedule.sigma(t)
    prediction = Prediction(x0, (x_t - alpha * x0) / sigma, alpha, sigma)
    torch.testing.assert_close(ddim_step(tiny_teacher, prediction, end), x_s, atol=1e-4, rtol=1e-4)
    assert grid_times(999, 4).tolist() == [-1, 249, 499, 749, 999]


def test_the_adversarial_losses_train_the_right_networks(tiny_teacher: LatentDiffusionTeacher) -> None:
    batch = batch_of(tiny_teacher)
    critic = Critic(tiny_teacher, CriticOptions("copy"))
    adversary = Adversary(critic, batch.real.shape[1:], batch.uncond, GanOptions())
    generated = batch.noise.clone().requires_grad_()
    adversary.generator_loss(generated, batch.conditioning, torch.Generator().manual_seed(0)).backward()
    assert generated.grad is not None and float(generated.grad.abs().sum()) > 0
    assert all(
        p.grad is None for module in (critic.denoiser.network, adversary.head) for p in module.parameters()
    )
    t = torch.full((4,), 300)
    features = critic.denoiser.mid_block_features(batch.noise, t, batch.conditioning)
    adversary.discriminator_loss(
        features, batch.real, batch.conditioning, torch.Generator().manual_seed(0)
    ).backward()
    trained = {
        name
        for name, p in critic.denoiser.network.named_parameters()
        if p.grad is not None and float(p.grad.abs().sum()) > 0
    }
    assert any("down_blocks" in name for name in trained)
    assert not any("up_blocks" in name for name in trained)
    assert adversary.head.out.weight.grad is not None


def test_the_generator_loss_is_taken_at_low_levels_only(
    tiny_teacher: LatentDiffusionTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(tiny_teacher)
    adversary = Adversary(
        Critic(tiny_teacher, CriticOptions("copy")), batch.real.shape[1:], batch.uncond, GanOptions(t_max=0.2)
    )
    times: list[Tensor] = []
    logits = adversary.logits
    monkeypatch.setattr(adversary, "logits", lambda x_t, t, c: times.append(t) or logits(x_t, t, c))
    source = torch.Generator().manual_seed(0)
    for _ in range(20):
        adversary.generator_loss(batch.noise, batch.conditioning, source)
    largest = int(torch.cat(times).max())
    assert 150 < largest < 200
    times.clear()
    for _ in range(20):
        t = torch.full((len(batch.noise),), 300)
        features = adversary.critic.denoiser.mid_block_features(batch.noise, t, batch.conditioning)
        adversary.discriminator_loss(features, batch.real, batch.conditioning, source)
    assert int(torch.cat(times).max()) > 500  # the discriminator itself is trained at every level
    with pytest.raises(UserError, match=r"gan.t_max is 0: a fraction"):
        GanOptions(t_max=0)


def test_an_exact_critic_has_no_error(schedule: NoiseSchedule) -> None:
    """The exact score of the student's points has error 0 within noise; that of an earlier student does
    not.
    """
    source = torch.Generator().manual_seed(0)
    points = 0.5 + 0.3 * torch.randn(20_000, 1, 1, 1, generator=source, dtype=torch.float64)
    weight = Conditioning(torch.ones(len(points), 1, 1, dtype=torch.float64))
    teacher = normal(0.0, 1.0, schedule)
    errors = {}
    for name, mean in (("now", 0.5), ("before", 0.3)):
        probes = critic_error(
            normal(mean, 0.3, schedule),
            points,
            weight,
            torch.Generator().manual_seed(1),
            {"teacher": teacher},
        )
        assert set(probes) == {"x_t", "eps", "teacher"}
        errors[name] = max(abs(value) for value in probes.values())
    assert errors["now"] < 0.03 < 0.1 < errors["before"]
    options = CriticDiagnosticsOptions(adapt=True, bounds=(1, 3))
    assert [adapt_updates(2, error, options) for error in (0.5, 0.02, 0.0)] == [3, 2, 1]
    assert adapt_updates(3, 0.5, options) == 3


def test_divergence_is_detected() -> None:
    monitor = Monitor(None, 1.0, None, MonitorOptions(max_fid_ratio=4.0, min_diversity_ratio=0.2))  # type: ignore[arg-type]
    assert (
        monitor.check_divergence({"frechet": 10.0, "diversity": 1.0, "saturation": 1.0}) is None
        and monitor.check_divergence({"frechet": 2.0, "diversity": 3.0, "saturation": 1.6}) is None
    )
    assert monitor.check_divergence({"frechet": 7.9, "diversity": 0.7, "saturation": 1.4}) is None
    assert "Fréchet distance rose from 2 to 8.1" in str(
        monitor.check_divergence({"frechet": 8.1, "diversity": 3.0})
    )
    assert "fell from 3 to 0.5" in str(monitor.check_divergence({"frechet": 2.0, "diversity": 0.5}))
    assert "not finite" in str(monitor.check_divergence({"frechet": math.nan, "diversity": 1.0}))
    assert monitor.warnings == [
        "samples are 1.60 times as saturated as real ones: lower the teacher's guidance"
    ]
    again = Monitor(None, 1.0, None, MonitorOptions())  # type: ignore[arg-type]
    again.load_state_dict(monitor.state_dict())
    assert again.best == {"frechet": 2.0, "diversity": 3.0} and again.warnings == monitor.warnings


def test_grey_images_have_a_finite_saturation() -> None:
    """Of digits the real ones have 0, and a student's too."""
    features = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    monitor = Monitor(
        moments(features),
        0.0,
        lambda latents: (features, torch.zeros(8)),
        MonitorOptions(samples_per_caption=2),
    )
    metrics = monitor.evaluate(torch.zeros(8, 1, 2, 2))
    assert metrics["saturation"] == 0 and monitor.check_divergence(metrics) is None


def test_impossible_method_options_raise() -> None:
    objective = {"terms": [{"predict": "teacher"}, {"predict": "critic", "coefficient": -1.0}], "critic": {}}
    for name, values, message in (
        ("distribution_matching.DistributionMatchingOptions", {}, "objective is missing"),
        (
            "distribution_matching.DistributionMatchingOptions",
            {"objective": {"terms": [{"predict": "teacher"}]}},
            "needs a critic",
        ),
        ("consistency.ConsistencyOptions", {"gan": {}}, "gan is not an option"),
        (
            "distribution_matching.DistributionMatchingOptions",
            {"objective": objective, "divergence": "forward_kl"},
            "give method.gan",
        ),
        ("progressive.ProgressiveOptions", {"start": 3}, "a power of two"),
    ):
        with pytest.raises(UserError, match=message):
            build(MethodOptions, {"_target_": f"distill.one_step.methods.{name}", **values})


def test_kernel_distance_by_hand() -> None:
    """Two pairs of points on a line: (x y + 1)^3 summed by hand, without the diagonal within a set."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    within = 1 + 27.0  # k(0, 1) and k(1, 2)
    across = (1 + 1 + 8 + 27) / 4
    assert kernel_distance(a, b, subsets=1) == (pytest.approx(within - 2 * across), 0.0)
    source = torch.Generator().manual_seed(0)
    c, d = (torch.randn(500, 4, generator=source) for _ in range(2))
    mean, std = kernel_distance(c, d, subsets=20, size=100)
    assert abs(mean) < std < 0.2


def test_precision_and_recall_by_hand() -> None:
    """Real points at 0, 1, 2, 3; samples at .5 and 50: half are covered; with k = 1 a real point's ball
    has radius 1.
    """
    real, samples = torch.arange(4.0)[:, None], torch.tensor([[0.5], [50.0]])
    precision, recall = precision_recall(real, samples, k=1)
    assert (precision, recall) == (0.5, 1.0)  # the samples' balls have radius 49.5 and cover all real points
    assert precision_recall(real, real, k=1) == (1.0, 1.0)
    with pytest.raises(UserError, match="needs more than 3"):
        precision_recall(real, samples)
