"""Latent consistency distillation against arithmetic: times, scalings, guided targets; stock diffusers."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule
from distill.core.score import Prediction
from distill.core.teacher import GUIDANCE
from distill.one_step.folder import load_student, save_student
from distill.one_step.methods.base import Batch, MethodContext, MicroBatch
from distill.one_step.methods.consistency import Consistency, ConsistencyOptions, TruncationOptions
from distill.one_step.methods.trajectories import grid_times
from distill.one_step.student import (
    GuidanceEmbedding,
    Student,
    StudentOptions,
    boundary_scalings,
    spaced_timesteps,
)
from distill.runtime.errors import UserError
from distill.teacher.denoiser import guidance_features
from distill.teacher.latent import LatentDiffusionTeacher
from distill.teacher.mixture import MixtureTeacher, ring

LCM = StudentOptions(
    sigma_max=None, steps=4, grid=50, timestep_scaling=10.0, guidance_embedding=GuidanceEmbedding(32, 3.0)
)


@dataclass
class RecordingStudent:
    """Predicts x0 = x_t at every time, and keeps what it is called with."""

    schedule: NoiseSchedule
    timesteps: tuple[int, ...] = (999,)
    grid: int | None = None
    guidance: float | None = 3.0
    calls: tuple[tuple[Tensor, Tensor, Conditioning], ...] = ()

    def requires_grad_(self, _: bool) -> "RecordingStudent":
        return self

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        self.calls = (*self.calls, (x_t, t, conditioning))
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return Prediction(x_t, (x_t - alpha * x_t) / sigma, alpha, sigma)


def mixture_batch(teacher: MixtureTeacher, count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    cond, uncond = teacher.encode_text(["c0"]).expand(count), teacher.encode_text([""])
    real = teacher.sample(cond, generator)
    noise = torch.randn(real.shape, generator=generator, dtype=torch.float64)
    return Batch(cond, uncond, real, noise)


def lcm_student(teacher: LatentDiffusionTeacher) -> Student:
    """A student that its guidance scale moves: the new layer is not zero."""
    student = Student.from_teacher(teacher, LCM)
    weight = student.denoiser.network.time_embedding.cond_proj.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
    return student


def test_times_are_those_of_the_stock_scheduler() -> None:
    """1000 levels in 50 steps skip k = 20 (LCM, section 4.3); sampling stays on the times of training."""
    assert grid_times(999, 50)[:3].tolist() == [-1, 19, 39]
    for steps in (1, 2, 3, 4, 8, 50):
        scheduler = LCMScheduler(original_inference_steps=50)
        scheduler.set_timesteps(steps)
        timesteps = spaced_timesteps(1000, steps, 50)
        assert list(timesteps) == scheduler.timesteps.tolist()
        assert set(timesteps) <= set(grid_times(999, 50).tolist())


def test_boundary_scalings_are_those_of_the_stock_scheduler() -> None:
    scheduler = LCMScheduler(timestep_scaling=10.0)
    for t in (0, 1, 19, 999):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(t)
        c_skip, c_out = boundary_scalings(torch.tensor([t]), 10.0)
        assert (float(c_skip), float(c_out)) == pytest.approx(expected, rel=1e-5)
    assert boundary_scalings(torch.tensor([0]), 10.0)[0].shape == (1, 1, 1, 1)


def test_guidance_features_are_those_of_the_stock_pipeline() -> None:
    scales = torch.tensor([1.0, 2.5, 8.0])
    pipeline = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
    expected = pipeline.get_guidance_scale_embedding(scales - 1, embedding_dim=16)
    torch.testing.assert_close(guidance_features(scales, 16), expected, atol=1e-4, rtol=0)


def test_target_is_one_step_of_the_guided_ode_at_each_samples_scale(schedule: NoiseSchedule) -> None:
    """Exact scores of a mixture: x_s = alpha_s x0 + sigma_s eps with eps = eps_0 + s (eps_c - eps_0)."""
    teacher, count = MixtureTeacher(ring(modes=4, radius=1.0, std=0.3, classes=2), schedule), 6
    batch, student = mixture_batch(teacher, count), RecordingStudent(schedule)
    options = ConsistencyOptions(grid=50, guidance_range=(2.0, 9.0), huber=0.001, elementwise=True)
    method = options.build(MethodContext(teacher, student, batch))  # type: ignore[arg-type]
    assert isinstance(method, Consistency)
    target: RecordingStudent = method.target  # type: ignore[assignment]
    outcome = method.loss(student, batch, 0.0, torch.Generator().manual_seed(3))  # type: ignore[arg-type]

    (x_s, s, conditioning), (x_t, t, same) = target.calls[0], student.calls[0]
    scales = conditioning.extras[GUIDANCE]
    assert torch.equal(scales, same.extras[GUIDANCE]) and 2 <= float(scales.min()) < float(scales.max()) <= 9
    assert torch.equal(x_t, schedule.add_noise(batch.real, batch.noise, t))
    assert (t - s).tolist() == [20] * count and set(t.tolist()) <= set(range(19, 1000, 20))

    weight = scales[:, None, None, None].double()
    uncond = teacher.predict(x_t, t, batch.uncond.expand(count)).eps
    eps = uncond + weight * (teacher.predict(x_t, t, batch.conditioning).eps - uncond)
    x0 = (x_t - schedule.sigma(t) * eps) / schedule.alpha(t)
    torch.testing.assert_close(x_s, schedule.alpha(s) * x0 + schedule.sigma(s) * eps, rtol=1e-5, atol=1e-5)

    expected = (((x_t - x_s).square() + 1e-6).sqrt() - 0.001).mean()  # both predict x0 = their input
    torch.testing.assert_close(outcome.loss, expected)


@dataclass
class ScaledStudent(RecordingStudent):
    """Predicts x0 = scale x_t."""

    scale: float = 1.0
    guidance: float | None = None

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        return super().predict(x_t, t, conditioning).with_x0(self.scale * x_t)

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale = state["scale"]


def test_a_truncated_stage_has_high_levels_and_the_first_stages_boundary(schedule: NoiseSchedule) -> None:
    """Its targets: below t' the first stage's student at the stage's beginning, else the target network."""
    teacher, count = MixtureTeacher(ring(modes=4, radius=1.0, std=0.3, classes=2), schedule), 64
    batch, student = mixture_batch(teacher, count), ScaledStudent(schedule)
    options = ConsistencyOptions(
        grid=20, guidance=1.0, elementwise=True, huber=1e-6, truncation=TruncationOptions(0.5, 2.0)
    )
    method = options.build(MethodContext(teacher, student, batch))  # type: ignore[arg-type]
    target: ScaledStudent = method.target  # type: ignore[assignment]
    target.scale = 5.0
    method.loss(student, batch, 0.49, torch.Generator().manual_seed(3))  # type: ignore[arg-type]
    (_, early, _), dividing = student.calls[-1], int(schedule.sigma_to_t(torch.tensor([2.0])))
    assert int(early.min()) < dividing and method.cost(0.49) == 5 and method.cost(0.5) == 6

    student.scale = 3.0
    method.loss(student, batch, 0.5, torch.Generator().manual_seed(3))  # type: ignore[arg-type]
    student.scale = 0.0  # later the boundary stays what it was
    outcome = method.loss(student, batch, 0.9, torch.Generator().manual_seed(3))  # type: ignore[arg-type]
    (_, t, _), (x_s, s, _) = student.calls[-1], target.calls[-1]
    assert int(t.min()) >= dividing > int(s.min()) and int(s.max()) > dividing
    scale = torch.where(s < dividing, 3.0, 5.0)[:, None, None, None]
    torch.testing.assert_close(outcome.loss, (scale * x_s).abs().mean(), atol=1e-4, rtol=0)


def test_a_truncation_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match="a truncation from 1 of the run at level 1"):
        TruncationOptions(start=1.0)


def test_huber_distance_of_a_sample_or_of_its_elements(schedule: NoiseSchedule) -> None:
    teacher = MixtureTeacher(ring(modes=4, radius=1.0, std=0.3, classes=2), schedule)
    context = MethodContext(teacher, RecordingStudent(schedule), mixture_batch(teacher, 2))  # type: ignore[arg-type]
    error = torch.tensor([[3.0, 4.0], [0.0, 0.0]])[..., None, None]
    c = 0.5 * math.sqrt(2)
    by_sample = ConsistencyOptions(huber=0.5).build(context)._distance(error)
    assert float(by_sample) == pytest.approx((math.sqrt(25 + c**2) - c) / 2)
    by_element = ConsistencyOptions(huber=0.5, elementwise=True).build(context)._distance(error)
    assert float(by_element) == pytest.approx((math.sqrt(9.25) + math.sqrt(16.25) + 2 * 0.5) / 4 - 0.5)


def test_target_network_follows_once_a_cycle(tiny_teacher: LatentDiffusionTeacher) -> None:
    """However many micro-batches a cycle has: w <- ema w + (1 - ema) p."""
    student = Student.from_teacher(tiny_teacher, StudentOptions(sigma_max=None))
    noise = torch.randn(2, *tiny_teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(tiny_teacher.encode_text(["a red cube"] * 2), tiny_teacher.encode_text([""]), noise, noise)
    method = ConsistencyOptions(ema=0.75).build(MethodContext(tiny_teacher, student, batch))
    generator = torch.Generator().manual_seed(0)
    outcomes = [method.loss(student, batch, 0.0, generator) for _ in range(2)]
    bias = student.denoiser.network.conv_out.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias.add_(1.0)
    method.update_critic([MicroBatch(outcome, batch, generator) for outcome in outcomes], 0.0)
    torch.testing.assert_close(method.target.denoiser.network.conv_out.bias, before + 0.25)


def test_a_guidance_embedding_has_no_effect_before_training(tiny_teacher: LatentDiffusionTeacher) -> None:
    student = Student.from_teacher(tiny_teacher, replace(LCM, timestep_scaling=None))
    x_t, t = torch.randn(2, *tiny_teacher.latent_shape), torch.tensor([999, 499])
    text = tiny_teacher.encode_text(["a red cube", "a blue duck"])
    assert torch.equal(student.predict(x_t, t, text).x0, tiny_teacher.predict(x_t, t, text).x0)
    student.predict(x_t, t, text).x0.square().mean().backward()
    assert float(student.denoiser.network.time_embedding.cond_proj.weight.grad.abs().max()) > 0

    trained = lcm_student(tiny_teacher)
    scales = torch.tensor([1.0, 3.0])
    with torch.no_grad():
        mixed = trained.predict(x_t, t, text.with_extras(**{GUIDANCE: scales})).x0
        own = trained.predict(x_t, t, text).x0  # at its own scale, 3
        lower = trained.with_denoiser(trained.denoiser, 1.0).predict(x_t, t, text).x0
    assert torch.equal(mixed[1], own[1]) and float((mixed[0] - own[0]).abs().max()) > 1e-3
    assert torch.equal(lower[0], mixed[0])


@pytest.mark.parametrize("steps", [1, 4])
def test_stock_diffusers_samples_the_same_image(
    steps: int, tiny_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    """Any number of steps, and any guidance scale, of one student."""
    student = lcm_student(tiny_teacher)
    folder = tmp_path / "student"
    save_student(folder, student, tiny_teacher)
    saved, parts = load_student(folder)
    assert (saved.timesteps, saved.grid, saved.guidance) == ((999, 759, 499, 259), 50, 3.0)
    assert saved.timestep_scaling == 10.0

    prompts, scale = ["a red cube"] * 2, 3.0 if steps == 4 else 1.5
    ours = Student(saved.denoiser, spaced_timesteps(1000, steps, 50), 50, 10.0, scale)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *tiny_teacher.latent_shape, generator=generator)  # the pipeline's latents
    with torch.no_grad():
        expected = parts.decode(ours(noise, parts.encode_text(prompts), generator))

    own = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)
    stock = StableDiffusionPipeline.from_pretrained(folder)
    defaults = {} if steps == 4 else {"num_inference_steps": 1, "guidance_scale": 1.5}
    for pipeline, options in (
        (own, defaults),
        (stock, {"num_inference_steps": steps, "guidance_scale": scale}),
    ):
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            prompts, generator=torch.Generator().manual_seed(0), output_type="pt", **options
        ).images
        torch.testing.assert_close(images.float(), expected, atol=2e-4, rtol=0)
    assert float(expected.std()) > 0.01


def test_impossible_options_raise(tiny_teacher: LatentDiffusionTeacher, schedule: NoiseSchedule) -> None:
    for values, message in (
        ({"grid": 3, "steps": 4}, "no 4 steps"),
        ({"timestep_scaling": 0.0}, "timestep_scaling is 0.0"),
    ):
        with pytest.raises(UserError, match=message):
            StudentOptions(**values)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="even dim of at least 4"):
        GuidanceEmbedding(7)
    with pytest.raises(UserError, match="two rising scales"):
        ConsistencyOptions(guidance_range=(5.0, 2.0))
    mixture = MixtureTeacher(ring(modes=4, radius=1.0, std=0.3, classes=2), schedule)
    batch = mixture_batch(mixture, 2)
    without = RecordingStudent(schedule, guidance=None)
    with pytest.raises(UserError, match="give distill.student.guidance_embedding"):
        ConsistencyOptions(guidance_range=(2.0, 5.0)).build(MethodContext(mixture, without, batch))  # type: ignore[arg-type]
    other = RecordingStudent(schedule, grid=50)
    with pytest.raises(UserError, match="student.grid is 50 and method.grid 25"):
        ConsistencyOptions().build(MethodContext(mixture, other, batch))  # type: ignore[arg-type]
