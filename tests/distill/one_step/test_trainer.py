"""The training loop: resumption, gradient accumulation and roll-back; methods on a Gaussian mixture with
exact scores; noise-image pairs; every method's config through the scripts.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import ROOT, script
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from distill.core.noise import NoiseSchedule
from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.data.folders import load_split
from distill.data.latents import load_latents
from distill.evaluation.judge import Judge, save_judge
from distill.evaluation.judge_columns import JudgeOptions
from distill.one_step.methods.base import MethodOptions
from distill.one_step.methods.sid import SiDOptions
from distill.one_step.points import MixtureStudy, grade_points, mixture_cache, point_monitor, point_pairs
from distill.one_step.recipe import OneStepRecipe, build_trainer
from distill.one_step.regression import (
    PairOptions,
    Pairs,
    Regression,
    RegressionOptions,
    feature_distance,
    load_pairs,
    make_pairs,
)
from distill.one_step.student import Student, StudentOptions
from distill.one_step.trainer import OneStep, OneStepOptions
from distill.runtime.checkpoint import load_state
from distill.runtime.config import build
from distill.runtime.curves import REAL_FIGURES
from distill.runtime.errors import UserError
from distill.runtime.precision import PrecisionName
from distill.runtime.run import Run, RunOptions
from distill.teacher.folder import load_clip
from distill.teacher.latent import LatentDiffusionTeacher
from distill.teacher.mixture import MixtureTeacher, ring

METHODS = ROOT / "configs" / "method"
LABELS = {"object": ("cube", "duck"), "colour": ("red", "blue"), "view": ("front", "side")}


def method_values(name: str) -> dict[str, Any]:
    """The config of a method with the configs that it inherits from."""
    values = yaml.safe_load((METHODS / f"{name}.yaml").read_text())
    parents = [parent for parent in values.pop("defaults", []) if parent != "_self_"]
    for parent in parents:
        values = method_values(parent) | values
    return values


def method_options(name: str) -> MethodOptions:
    return build(MethodOptions, method_values(name), name)


@pytest.fixture(scope="module")
def study() -> MixtureStudy:
    """A ring of four modes in two classes, its exact scores, and a network fitted to it."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    mixture = ring(4, std=0.15, classes=2)
    return MixtureStudy(MixtureTeacher(mixture, NoiseSchedule(scheduler.alphas_cumprod)), steps=600)


def trainer_of(
    study: MixtureStudy,
    directory: Path,
    steps: int,
    method: MethodOptions,
    pairs: Pairs | None = None,
    **options: Any,
) -> OneStep:
    run_options = RunOptions(str(directory), steps, trackers=(), checkpoint_every=4, preview_every=10**9)
    run = Run(run_options, {}, "toy")
    small = {
        "batch": 64,
        "learning_rate": 1e-3,
        "warmup": 5,
        "monitor": {"every": 50, "max_fid_ratio": 1e9, "min_diversity_ratio": 0.0},
        "critic_diagnostics": {"every": 10},
    }
    training = build(OneStepOptions, {**small, **options})
    cache = mixture_cache(study.exact, 2048, torch.Generator().manual_seed(5))
    return OneStep(run, study, cache, method, training, point_monitor(cache, training.monitor), pairs=pairs)


def weights(trainer: OneStep) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.student.parameters()])


def gradients(trainer: OneStep) -> Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.student.parameters() if p.grad is not None])


def recipe_of(
    teacher: LatentDiffusionTeacher, world: Path, run: RunOptions, method: MethodOptions, **options: Any
) -> OneStepRecipe:
    return OneStepRecipe(
        teacher=teacher.name_or_path,
        data=str(world / "data"),
        judge=str(world / "judge"),
        run=run,
        method=method,
        distill=build(OneStepOptions, options),
    )


@pytest.mark.parametrize("name", ["dmd2", "progressive"])
def test_a_resumed_distillation_is_the_same(name: str, study: MixtureStudy, tmp_path: Path) -> None:
    method = method_options(name)
    whole = trainer_of(study, tmp_path / "whole", 8, method)
    whole.train()
    first = trainer_of(study, tmp_path / "parts", 8, method)
    for step in first.run.steps(keep_start=True):
        first.set_learning_rates(step)
        first.cycle(step)
        if step == 4:
            break
    first.run._release()
    second = trainer_of(study, tmp_path / "parts", 8, method)
    second.train()
    assert torch.equal(weights(whole), weights(second))
    assert not torch.equal(weights(whole), weights(trainer_of(study, tmp_path / "fresh", 8, method)))


def test_gradients_of_micro_batches_are_averaged(study: MixtureStudy, tmp_path: Path) -> None:
    """With two parts a cycle the student's gradient is the mean of the parts'."""
    method = method_options("diff_instruct")
    accumulated = trainer_of(study, tmp_path / "accumulated", 4, method, accumulate=2, batch=16)
    accumulated.accumulate_gradients(0)
    single = trainer_of(study, tmp_path / "single", 4, method, accumulate=2, batch=16)
    halves = []
    for part in range(2):
        single.optimizer.zero_grad()
        batch, generator = single.micro_batch(0, part)
        single.method.loss(single.student, batch, 0.0, generator).loss.backward()
        halves.append(gradients(single))
    torch.testing.assert_close(gradients(accumulated), (halves[0] + halves[1]) / 2, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(halves[0], halves[1], rtol=0.1)


def test_methods_on_the_mixture_are_compared_at_equal_nfe(tmp_path: Path) -> None:
    small = ["points.budget=60", "points.init_steps=5", "points.batch=16", "points.pairs=32", "seeds=[0, 1]"]
    output = script("distill_points", *small, "methods=[dmd, f_distill, progressive]", f"output={tmp_path}")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    names = ["dmd", "dmd", "f_distill", "f_distill", "progressive", "progressive"]
    assert [row["loss"] for row in rows] == names
    assert all(45 <= row["nfe"] <= 75 for row in rows) and "| f_distill | own | 2 | 4 |" in output
    error = script("distill_points", "methods=[nothing]", f"output={tmp_path}", code=2)
    assert "method is 'nothing': expected one of" in error


def test_half_precision_gradients_agree_with_float32(
    tiny_teacher: LatentDiffusionTeacher, world: Path, tmp_path: Path
) -> None:
    """bf16 by autocast on the CPU: the first gradient has float32's direction and stays float32."""
    both = []
    precisions: tuple[PrecisionName, ...] = ("float32", "bfloat16")
    for precision in precisions:
        run = RunOptions(str(tmp_path / precision), 1, trackers=(), precision=precision)
        options = {"batch": 4, "warmup": 1}
        trainer = build_trainer(recipe_of(tiny_teacher, world, run, method_options("dmd2"), **options))
        trainer.accumulate_gradients(0)
        both.append(gradients(trainer))
    assert float(torch.cosine_similarity(*both, dim=0)) > 0.9
    assert not torch.equal(*both) and both[1].dtype == torch.float32


def test_a_diverged_run_is_rolled_back_and_reported(study: MixtureStudy, tmp_path: Path) -> None:
    trainer = trainer_of(study, tmp_path, 12, method_options("diff_instruct"))
    cycle, broken = trainer.cycle, []

    def break_once(step: int) -> tuple[dict[str, Any], bool]:
        metrics, finite = cycle(step)
        if step == 6 and not broken:
            broken.append(step)
            with torch.no_grad():
                next(trainer.student.parameters()).fill_(float("nan"))
            return metrics, False
        return metrics, finite

    trainer.cycle = break_once  # type: ignore[method-assign,assignment]
    averaged, _ = trainer.train()
    trainer.run.finish({})
    rollbacks = json.loads((tmp_path / "result.json").read_text())["run"]["rollbacks"]
    assert rollbacks == [{"step": 7, "to": 4, "reason": "the loss or a weight is not finite"}]
    assert all(bool(p.isfinite().all()) for p in averaged.parameters())
    assert trainer.optimizer.param_groups[0]["lr"] < 0.5 * 1e-3 * 0.2  # halved for the remaining cycles


def test_a_run_that_keeps_diverging_stops(study: MixtureStudy, tmp_path: Path) -> None:
    trainer = trainer_of(study, tmp_path, 12, method_options("diff_instruct"), learning_rate=1e20)
    with pytest.raises(UserError, match="after 3 roll-backs: lower learning_rate"):
        trainer.train()


COVERING = (
    *("dmd2", "sid", "consistency", "truncated_consistency", "continuous_consistency", "progressive"),
    *("mean_flow", "shortcut", "moment_matching", "knowledge_distillation", "ladd"),
)


@pytest.mark.parametrize("name", COVERING)
def test_methods_cover_the_modes_of_the_mixture(name: str, study: MixtureStudy, tmp_path: Path) -> None:
    """From the teacher's network, which predicts the mean: much nearer to exact samples, in all modes."""
    # GAN weights: a point has two numbers, not a latent's thousand.
    method = method_options(name).unguided(2e-3, (3.0, 0.01))
    if isinstance(method, SiDOptions):
        method = replace(method, critic=replace(method.critic, updates=5))
    options: dict[str, Any] = {"student": {"sigma_max": None}} if method.from_last_level else {}
    if name == "ladd":  # the only one without a target that stands still
        options["learning_rate"] = 3e-4
    steps = 250 if method.critic_updates else 800  # cycles of trajectories cost less
    pairs = None
    if method.needs_pairs:
        generator = torch.Generator().manual_seed(3)
        pairs = point_pairs(study, mixture_cache(study.exact, 4096, generator), 4096, generator)
    trainer = trainer_of(study, tmp_path, steps, method, pairs=pairs, **options)
    before = grade_points(trainer.student, study.exact)
    after = grade_points(trainer.train()[0], study.exact)
    floor = after["w2_floor"]
    assert after["w2"] - floor < 0.5 * (before["w2"] - floor), (before, after)
    assert after["coverage"] >= 0.75 and after["kl"] < 0.5 * before["kl"], (before, after)


def test_pairs_are_samples_of_the_teacher(tiny_teacher: LatentDiffusionTeacher, tmp_path: Path) -> None:
    options = PairOptions(count=5, steps=2, guidance=2.0, shard=2, batch=2)
    captions = ["a red cube", "a blue duck", "a green teapot"]
    make_pairs(tiny_teacher, captions, tmp_path, options)
    stamp = (tmp_path / "pairs_00001.safetensors").stat().st_mtime_ns
    (tmp_path / "pairs_00002.safetensors").unlink()  # as of an interrupted run
    make_pairs(tiny_teacher, captions, tmp_path, options)
    assert (tmp_path / "pairs_00001.safetensors").stat().st_mtime_ns == stamp
    pairs = load_pairs(tmp_path, tiny_teacher)
    assert pairs.noise.shape == (5, *tiny_teacher.latent_shape) and pairs.caption.tolist() == [0, 1, 2, 0, 1]
    model = Guided(tiny_teacher, tiny_teacher.encode_text([""]), 2.0)
    conditioning = pairs.conditioning.select(pairs.caption)
    again = sample_ode(model, tiny_teacher.scheduler, conditioning, pairs.noise, 2)
    torch.testing.assert_close(pairs.latents, again, atol=4e-3, rtol=2e-3)  # stored in half precision
    with pytest.raises(UserError, match="another teacher, captions or options"):
        make_pairs(tiny_teacher, captions, tmp_path, PairOptions(count=5, steps=3, shard=2))
    with pytest.raises(UserError, match=r"pairs\.json does not exist"):
        load_pairs(tmp_path / "none", tiny_teacher)


@pytest.mark.parametrize("distance", ["latents", "pixels", "features"])
def test_regression_is_zero_on_the_students_own_samples(
    distance: str, tiny_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    options = PairOptions(count=4, steps=1, guidance=1.0, shard=4)
    make_pairs(tiny_teacher, ["a red cube", "a blue duck"], tmp_path, options)
    pairs = load_pairs(tmp_path, tiny_teacher)
    # One step from the last level generated the pairs.
    student = Student.from_teacher(tiny_teacher, StudentOptions(sigma_max=None))
    judge = Judge({"object": ("a", "b")}, JudgeOptions(("object",), width=8)).eval().requires_grad_(False)
    regression = RegressionOptions(str(tmp_path), 2.0, distance)  # type: ignore[arg-type]
    loss = Regression(pairs, regression, tiny_teacher.decode, judge.layers)
    exact = loss(student, 4, torch.Generator().manual_seed(0))
    network: Any = student.denoiser.network
    with torch.no_grad():
        network.conv_out.bias.add_(0.3)
    biased = loss(student, 4, torch.Generator().manual_seed(0))
    assert exact.item() < 0.02 * biased.item()
    biased.backward()
    assert network.conv_in.weight.grad is not None
    if distance == "latents":  # x0 is -v at the last level: every error is 0.3; weight 2, half the squares
        expected = 2 * 0.3**2 / 2 * pairs.latents[0].numel()
        assert biased.item() == pytest.approx(expected, rel=0.02)


def test_feature_distance_by_hand() -> None:
    """One layer of one pixel: unit vectors at a right angle are sqrt 2 apart."""
    a, b = torch.tensor([3.0, 0.0])[None, :, None, None], torch.tensor([0.0, 5.0])[None, :, None, None]
    assert float(feature_distance(lambda x: [x], a, b)) == pytest.approx(2.0)
    assert float(feature_distance(lambda x: [x, x], a, 7 * a)) == pytest.approx(0.0, abs=1e-9)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioned folder of a few renders, and a judge beside it."""
    folder = tmp_path_factory.mktemp("world")
    small = ["world.train=24", "world.validation=2", "world.test=12", "world.pairs=0", "world.supersample=1"]
    script("make_shapes", f"output={folder / 'data'}", *small)
    save_judge(Judge(LABELS, JudgeOptions(tuple(LABELS), width=8)), folder / "judge", {})
    return folder


def test_latents_are_cached(tiny_teacher: LatentDiffusionTeacher, world: Path) -> None:
    cache = load_latents(tiny_teacher, world / "data")
    data = load_split(world / "data", "train", 64)
    with torch.no_grad():
        latents = tiny_teacher.encode_images(data.composite(slice(0, 4)))
    torch.testing.assert_close(cache.latents_of(torch.arange(4)), latents, atol=2e-3, rtol=2e-3)
    pairs = ((cache.conditioning_of(torch.tensor([0])), data.texts[:1]), (cache.uncond, [""]))
    for conditioning, prompts in pairs:
        expected = tiny_teacher.encode_text(prompts).embedding
        torch.testing.assert_close(conditioning.embedding, expected, atol=2e-3, rtol=2e-3)
    folder = world / "data" / ".latents"
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = load_latents(tiny_teacher, world / "data")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    assert torch.equal(again.latents, cache.latents)


def stated() -> dict[str, list[float]]:
    """The NFE per cycle of each method in docs/one_step.md, of the first and the last cycle."""
    row = r"^\| `(\w+)` \| \d{4}\.\d{5}.*\| ([\d., then]+) \|$"
    rows = re.findall(row, (ROOT / "docs" / "one_step.md").read_text(), re.MULTILINE)
    return {name: [pytest.approx(float(cost)) for cost in costs.split(", then ")] for name, costs in rows}


@pytest.mark.parametrize("name", [*sorted(path.stem for path in METHODS.glob("*.yaml")), "lora"])
def test_every_method_runs(
    name: str, tiny_teacher: LatentDiffusionTeacher, world: Path, tmp_path: Path
) -> None:
    values = method_values("dmd2" if name == "lora" else name)
    if name == "lora":
        values["objective"]["critic"]["kind"] = "lora"
    if name in ("dmd", "knowledge_distillation", "reflow"):
        captions = ["a red cube", "a blue duck"]
        make_pairs(tiny_teacher, captions, tmp_path / "pairs", PairOptions(count=4, steps=1))
        folder = {"pairs": str(tmp_path / "pairs")}
        values |= folder if name == "reflow" else {"regression": values["regression"] | folder}
    if name == "moment_matching":
        values |= {"group": 2}
    small: dict[str, Any] = {
        "batch": 2,
        "monitor": {"captions": 2},
        "critic_diagnostics": {"every": 1},
        "student": {"steps": 2},
    }
    run = RunOptions(str(tmp_path / "run"), 2, trackers=())
    method = build(MethodOptions, values, name)
    trainer = build_trainer(recipe_of(tiny_teacher, world, run, method, **small))
    teacher = trainer.teacher
    assert isinstance(teacher, LatentDiffusionTeacher)
    network = teacher.denoiser.network
    before, frozen = weights(trainer), network.conv_in.weight.clone()
    trainer.train()
    assert torch.equal(network.conv_in.weight, frozen)
    after = weights(trainer)
    assert float((after - before).abs().max()) > 0 and bool(after.isfinite().all())
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["frechet"] > 0 and metrics["diversity"] >= 0 and trainer.nfe > 0
    two_stages = ("progressive", "continuous_consistency", "truncated_consistency")
    cycles = (0.0, 0.99) if name in two_stages else (0.0,)
    assert name == "lora" or stated()[name] == [trainer.method.cost(progress) for progress in cycles]
    assert ("critic_error" in metrics) == (trainer.method.critic is not None)


def test_the_scripts_train_and_evaluate(tiny_teacher_folder: Path, world: Path, tmp_path: Path) -> None:
    inputs = [f"teacher={tiny_teacher_folder}", f"data={world / 'data'}", f"judge={world / 'judge'}"]
    small = ["run.steps=2", "run.trackers=[]", "distill.batch=2", "distill.monitor.captions=2"]
    run = tmp_path / "run"
    output = script("distill_one_step", *inputs, "method=f_distill", f"run.directory={run}", *small)
    assert "the student's input is pure noise at t = 589" in output
    method = json.loads((run / "result.json").read_text())["config"]["method"]
    assert method["divergence"] == "jensen_shannon" and method["gan"]["generator_weight"] > 0

    sizes = ["samples=12", "captions=2", "each=2", "neighbours=1"]
    options = [*(f"evaluation.{size}" for size in sizes), "steps=[2]", f"features={world / 'judge'}"]
    inputs.append(f"students=[{run / 'student'}, {run / 'student_raw'}]")
    script("evaluate_generator", *inputs, *options, f"output={tmp_path / 'e'}")
    files = sorted(path for path in (tmp_path / "e").glob("*.json") if path.name != REAL_FIGURES)
    rows = [json.loads(path.read_text()) for path in files]
    assert len(rows) == 3 and {row["nfe"] for row in rows} == {1, 4}
    assert all(0 <= row["recall"] <= 1 for row in rows)

    prompts = ["a red cube", "a blue duck", "compare=[1, 2]", "count=2", f"output={tmp_path / 's'}"]
    output = script("sample", inputs[0], f"student={run / 'student'}", *prompts)
    assert "teacher, 2 steps, guidance 3" in output
    assert Image.open(tmp_path / "s" / "samples.png").size == (4 * 64 + 3 * 2, 3 * 64 + 2 * 2)
    images = ["000_00.png", "000_01.png", "001_00.png", "001_01.png"]
    assert sorted(path.name for path in (tmp_path / "s").glob("0*")) == images
    error = script("sample", inputs[0], f"student={tiny_teacher_folder}", "a red cube", code=2)
    assert "is no student: give" in error

    script("make_pairs", *inputs[:2], f"output={tmp_path / 'pairs'}", "pairs.count=4", "pairs.steps=1")
    assert (tmp_path / "pairs" / "pairs_00000.safetensors").is_file()


@pytest.mark.parametrize(
    "extra",
    [
        ["distill.shard=false"],
        ["distill.shard=true"],
        pytest.param(["distill.shard=true", "method.objective.critic.kind=lora"], marks=pytest.mark.slow),
        pytest.param(["distill.shard=true", "method=consistency"], marks=pytest.mark.slow),
        pytest.param(["distill.shard=true", "method=progressive"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_result_of_one(
    tiny_teacher: LatentDiffusionTeacher, world: Path, tmp_path: Path, extra: list[str]
) -> None:
    """Two batches a cycle, by one process or one by each of two (gloo, on the CPU), with whole or sharded
    weights: the same student, to rounding, which one process resumes.
    """
    inputs = [f"teacher={tiny_teacher.name_or_path}", f"data={world / 'data'}", f"judge={world / 'judge'}"]
    training = ["monitor.captions=2", "batch=2", "accumulate=2", "warmup=1", "learning_rate=0.01"]
    options = ["run.steps=3", "run.trackers=[]", *(f"distill.{option}" for option in training), *extra]
    script("distill_one_step", *inputs, *options, f"run.directory={tmp_path / 'one'}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = str(ROOT / "scripts" / "distill_one_step.py")
    command = [*launcher, program, *inputs, *options, f"run.directory={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("written: ") == 1

    newest = "checkpoints/step_00000003.safetensors"
    states = [load_state(tmp_path / name / newest)["parts"] for name in ("one", "two")]
    initial = torch.cat([p.flatten() for p in tiny_teacher.denoiser.network.parameters()])
    for part in ["student"] + ["critic"] * ("critic" in states[0]):
        vectors = (torch.cat([value.flatten() for value in tensors_of(state[part])]) for state in states)
        one, two = (vector[: len(initial)] for vector in vectors)
        change = (one - initial).norm() if len(one) == len(initial) else one.norm()
        # sharded convolutions round otherwise, and Adam makes steps of rounding errors
        assert float((one - two).norm()) < (0.06 if "true" in extra[0] else 0.02) * float(change), part

    weights, before = "student/unet/diffusion_pytorch_model.safetensors", tiny_teacher.network.state_dict()
    averaged = [load_file(tmp_path / name / weights) for name in ("one", "two")]
    one, two = (torch.cat([(state[k].float() - before[k]).flatten() for k in before]) for state in averaged)
    assert float((one - two).norm()) < 0.1 * float(one.norm())  # saved in half precision
    resumed = [f"run.directory={tmp_path / 'two'}", "run.steps=4"]
    assert "written: " in script("distill_one_step", *inputs, *options, *resumed)


def test_processes_must_divide_accumulate(
    tiny_teacher: LatentDiffusionTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.runtime.processes.world_size", lambda: 2)
    run, method = RunOptions(str(tmp_path), 1, trackers=()), method_options("consistency")
    assert recipe_of(tiny_teacher, tmp_path, run, method, accumulate=4).distill.accumulate == 4
    with pytest.raises(UserError, match="accumulate is 1: 2 processes need a multiple"):
        recipe_of(tiny_teacher, tmp_path, run, method)


def tensors_of(state: dict[str, Any]) -> list[Tensor]:
    return list(state["parameters"] if "parameters" in state else state.values())


def test_without_a_judge_the_monitor_uses_clip_features(
    tiny_teacher: LatentDiffusionTeacher, world: Path, tmp_path: Path
) -> None:
    run = RunOptions(str(tmp_path / "run"), 1, trackers=())
    small = {"batch": 2, "monitor": {"captions": 2}}
    recipe = recipe_of(tiny_teacher, world, run, method_options("diff_instruct"), **small)
    trainer = build_trainer(replace(recipe, judge=None))
    trainer.train()
    width = load_clip(tiny_teacher.name_or_path).config.projection_dim
    assert trainer.monitor is not None and len(trainer.monitor.real.mean) == width
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["frechet"] > 0 and metrics["diversity"] > 0
