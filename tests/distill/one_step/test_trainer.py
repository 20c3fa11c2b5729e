"""The whole loop: resumed, accumulated, rolled back; each method on the oracle; pairs; and every method's config through the script."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import ROOT, script
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from distill.core.noise import NoiseSchedule
from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.data.folders import load_split
from distill.data.latents import load_latents
from distill.evaluation.judge import Judge, JudgeOptions, load_judge, save_judge
from distill.one_step.build import start
from distill.one_step.points import MixtureStudy, grade_points, mixture_cache, point_monitor
from distill.one_step.regression import (
    PairOptions,
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
from distill.runtime.errors import UserError
from distill.runtime.files import write_json
from distill.runtime.run import Run, RunOptions
from distill.teacher.latent import LatentDiffusionTeacher
from distill.teacher.mixture import MixtureTeacher, ring

METHODS = ROOT / "configs" / "method"


def method(name: str, **changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load((METHODS / f"{name}.yaml").read_text()), **changes}


@pytest.fixture(scope="module")
def study() -> MixtureStudy:
    """A ring of four modes in two classes, its exact scores, and a network fitted to it."""
    stock = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    return MixtureStudy(
        MixtureTeacher(ring(4, std=0.15, classes=2), NoiseSchedule(stock.alphas_cumprod)), steps=600
    )


def distil(
    study: MixtureStudy, directory: Path, steps: int, given: dict[str, Any], **options: Any
) -> OneStep:
    run = Run(
        RunOptions(
            str(directory), options.pop("total", steps), trackers=(), checkpoint_every=4, preview_every=10**9
        ),
        {},
        "toy",
    )
    small = {
        "batch": 64,
        "learning_rate": 1e-3,
        "warmup": 5,
        "monitor": {"every": 50, "worse": 1e9, "collapse": 0.0},
        "lag": {"every": 10},
    }
    chosen = build(OneStepOptions, {**small, "method": given, **options})
    cache = mixture_cache(study.exact, 2048, torch.Generator().manual_seed(5))
    return OneStep(run, study, cache, chosen, point_monitor(cache, chosen.monitor))


def weights(task: OneStep) -> Tensor:
    return torch.cat([p.detach().flatten() for p in task.student.parameters()])


@pytest.mark.parametrize("name", ["dmd2", "progressive"])
def test_a_resumed_distillation_is_the_same(name: str, study: MixtureStudy, tmp_path: Path) -> None:
    whole = distil(study, tmp_path / "whole", 8, method(name))
    whole.train()
    first = distil(study, tmp_path / "parts", 8, method(name))
    for step in first.run.steps(keep_start=True):
        first._set_rates(step)
        first.cycle(step)
        if step == 4:
            break
    first.run._release()
    second = distil(study, tmp_path / "parts", 8, method(name))
    second.train()
    assert torch.equal(weights(whole), weights(second))
    assert not torch.equal(weights(whole), weights(distil(study, tmp_path / "fresh", 8, method(name))))


def test_parts_of_a_batch_add_up(study: MixtureStudy, tmp_path: Path) -> None:
    """With two parts a cycle the student's gradient is the mean of the parts'."""
    given = method("diff_instruct")
    both = distil(study, tmp_path / "both", 4, given, accumulate=2, batch=16)
    both.optimizer.step = lambda: None  # type: ignore[method-assign,assignment]
    both.cycle(0)
    got = torch.cat([p.grad.flatten() for p in both.student.parameters() if p.grad is not None])
    single = distil(study, tmp_path / "single", 4, given, accumulate=2, batch=16)
    halves = []
    for part in range(2):
        single.optimizer.zero_grad()
        batch, generator = single.draw(0, part)
        single.method.loss(single.student, batch, 0.0, generator).loss.backward()
        halves.append(
            torch.cat([p.grad.flatten() for p in single.student.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(got, (halves[0] + halves[1]) / 2, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(halves[0], halves[1], rtol=0.1)


def test_the_oracle_compares_methods_at_equal_work(tmp_path: Path) -> None:
    few = ["points.budget=60", "points.fitting=5", "points.batch=16", "points.pairs=32", "seeds=[0, 1]"]
    told = script("distill_points", *few, "methods=[dmd, f_distill, progressive]", f"output={tmp_path}")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["loss"] for row in rows] == [
        "dmd",
        "dmd",
        "f_distill",
        "f_distill",
        "progressive",
        "progressive",
    ]
    assert all(45 <= row["forwards"] <= 75 for row in rows) and "| f_distill | own | 2 | 4 |" in told
    assert "method 'nothing' is none of" in script(
        "distill_points", "methods=[nothing]", f"output={tmp_path}", code=2
    )


def test_half_precision_moves_the_student_the_same_way(
    tiny_teacher: LatentDiffusionTeacher, world: Path, tmp_path: Path
) -> None:
    """bf16 by autocast on the CPU: the first update points where float32's does, and what it answers stays float32."""
    moves = []
    for precision in ("float32", "bfloat16"):
        options = build(
            OneStepOptions, {"method": method("dmd2"), "batch": 4, "warmup": 1, "precision": precision}
        )
        run = Run(RunOptions(str(tmp_path / precision), 1, trackers=()), {}, precision)
        task = start(run, tiny_teacher, load_judge(world / "judge"), str(world / "data"), options)
        task.cycle(0)
        moves.append(torch.cat([p.grad.flatten() for p in task.student.parameters() if p.grad is not None]))
    assert (
        float(torch.cosine_similarity(*moves, dim=0)) > 0.9
        and not torch.equal(*moves)
        and moves[1].dtype == torch.float32
    )


def test_a_diverging_run_is_rolled_back_and_says_so(study: MixtureStudy, tmp_path: Path) -> None:
    task = distil(study, tmp_path, 12, method("diff_instruct"))
    cycle, broken = task.cycle, []

    def break_once(step: int) -> tuple[dict[str, Any], bool]:
        done = cycle(step)
        if step == 6 and not broken:
            broken.append(step)
            with torch.no_grad():
                next(task.student.parameters()).fill_(float("nan"))
            return done[0], False
        return done

    task.cycle = break_once  # type: ignore[method-assign]
    averaged, _ = task.train()
    task.run.finish({})
    told = json.loads((tmp_path / "result.json").read_text())["run"]["rollbacks"]
    assert told == [{"step": 7, "to": 4, "reason": "the loss or a weight is not finite"}]
    assert all(bool(p.isfinite().all()) for p in averaged.parameters())
    assert task.optimizer.param_groups[0]["lr"] < 0.5 * 1e-3 * 0.2  # halved for what is left


def test_a_run_that_keeps_diverging_stops(study: MixtureStudy, tmp_path: Path) -> None:
    task = distil(study, tmp_path, 12, method("diff_instruct"), learning_rate=1e20)
    with pytest.raises(UserError, match="after 3 roll-backs: lower learning_rate"):
        task.train()


@pytest.mark.parametrize("name", ["dmd2", "sid", "consistency", "progressive"])
def test_methods_reach_the_modes_of_the_oracle(name: str, study: MixtureStudy, tmp_path: Path) -> None:
    """From the teacher's network, which answers the mean, towards the modes: much nearer, and all of them."""
    changes: dict[str, Any] = {}
    if name == "dmd2":
        changes["objective"] = method(name)["objective"]
        changes["objective"]["terms"][0].pop("guidance")
        changes["objective"]["critic"]["learning_rate"] = 2e-3
        changes["gan"] = {
            "generator": 3.0,
            "critic": 0.01,
        }  # a point has two numbers, not a latent's thousand
    if name == "sid":
        changes |= {
            "second_order": {"alpha": 1.0},
            "critic": {"kind": "copy", "learning_rate": 2e-3, "updates": 5},
        }
    if name in ("consistency", "progressive"):
        changes[name] = {**method(name)[name], "guidance": 1.0}
    options = {"student": {"level": None}} if name in ("consistency", "progressive") else {}
    task = distil(
        study, tmp_path, 250 if name in ("dmd2", "sid") else 800, method(name, **changes), **options
    )
    before = grade_points(task.student, study.exact)
    after = grade_points(task.train()[0], study.exact)
    floor = after["w2_floor"]
    assert after["w2"] - floor < 0.5 * (before["w2"] - floor), (before, after)
    assert after["coverage"] >= 0.75 and after["kl"] < 0.5 * before["kl"], (before, after)


def test_pairs_are_what_the_teacher_samples(tiny_teacher: LatentDiffusionTeacher, tmp_path: Path) -> None:
    options = PairOptions(count=5, steps=2, guidance=2.0, shard=2, batch=2)
    captions = ["a red cube", "a blue duck", "a green teapot"]
    make_pairs(tiny_teacher, captions, tmp_path, options)
    stamp = (tmp_path / "pairs_00001.safetensors").stat().st_mtime_ns
    (tmp_path / "pairs_00002.safetensors").unlink()  # as if it had been stopped
    make_pairs(tiny_teacher, captions, tmp_path, options)
    assert (tmp_path / "pairs_00001.safetensors").stat().st_mtime_ns == stamp
    pairs = load_pairs(tmp_path, tiny_teacher.encode_text)
    assert pairs.noise.shape == (5, *tiny_teacher.latent_shape) and pairs.caption.tolist() == [0, 1, 2, 0, 1]
    model = Guided(tiny_teacher, tiny_teacher.encode_text([""]), 2.0)
    again = sample_ode(model, tiny_teacher.scheduler, pairs.states[pairs.caption], pairs.noise, 2)
    torch.testing.assert_close(pairs.latents, again, atol=4e-3, rtol=2e-3)  # stored in half precision
    with pytest.raises(UserError, match="another teacher, captions or options"):
        make_pairs(tiny_teacher, captions, tmp_path, PairOptions(count=5, steps=3, shard=2))
    with pytest.raises(UserError, match=r"pairs\.json does not exist"):
        load_pairs(tmp_path / "none", tiny_teacher.encode_text)


@pytest.mark.parametrize("distance", ["latents", "pixels", "features"])
def test_regression_is_zero_on_what_the_student_makes(
    distance: str, tiny_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    make_pairs(
        tiny_teacher,
        ["a red cube", "a blue duck"],
        tmp_path,
        PairOptions(count=4, steps=1, guidance=1.0, shard=4),
    )
    pairs = load_pairs(tmp_path, tiny_teacher.encode_text)
    student = Student.of(
        tiny_teacher, StudentOptions(level=None)
    )  # one step from the last level is what made them
    judge = Judge({"object": ("a", "b")}, JudgeOptions(width=8)).eval().requires_grad_(False)
    options = RegressionOptions(str(tmp_path), 2.0, distance)  # type: ignore[arg-type]
    loss = Regression(pairs, options, tiny_teacher.decode, judge.layers)
    exact = loss(student, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        student.unet.conv_out.bias.add_(0.3)
    moved = loss(student, 4, torch.Generator().manual_seed(0))
    assert exact.item() < 0.02 * moved.item()
    moved.backward()
    assert student.unet.conv_in.weight.grad is not None
    if (
        distance == "latents"
    ):  # x0 is -v at the last level: each number is off by .3; weight 2, half the sum of squares
        assert moved.item() == pytest.approx(2 * 0.3**2 / 2 * pairs.latents[0].numel(), rel=0.02)


def test_feature_distance_by_hand() -> None:
    """One layer of one pixel: unit vectors at a right angle are sqrt 2 apart."""
    a, b = torch.tensor([3.0, 0.0])[None, :, None, None], torch.tensor([0.0, 5.0])[None, :, None, None]
    assert float(feature_distance(lambda x: [x], a, b)) == pytest.approx(2.0)
    assert float(feature_distance(lambda x: [x, x], a, 7 * a)) == pytest.approx(0.0, abs=1e-9)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioned folder of a few renders, and a judge beside it."""
    folder = tmp_path_factory.mktemp("world")
    few = ["world.train=24", "world.validation=2", "world.test=12", "world.pairs=0", "world.supersample=1"]
    script("make_shapes", f"output={folder / 'data'}", *few)
    labels = {"object": ("cube", "duck"), "colour": ("red", "blue"), "view": ("front", "side")}
    save_judge(Judge(labels, JudgeOptions(width=8)), folder / "judge", {})
    return folder


def test_latents_are_made_once(tiny_teacher: LatentDiffusionTeacher, world: Path) -> None:
    cache = load_latents(tiny_teacher, world / "data")
    data = load_split(world / "data", "train", 64)
    with torch.no_grad():
        own = tiny_teacher.encode_images(data.composite(slice(0, 4)))
    torch.testing.assert_close(cache.latents[:4], own, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(
        cache.states[cache.caption[:1]], tiny_teacher.encode_text(data.texts[:1]), atol=2e-3, rtol=2e-3
    )
    torch.testing.assert_close(cache.states[-1:], tiny_teacher.encode_text([""]), atol=2e-3, rtol=2e-3)
    (kept,) = (world / "data" / ".latents").iterdir()
    stamp = kept.stat().st_mtime_ns
    again = load_latents(tiny_teacher, world / "data")
    assert kept.stat().st_mtime_ns == stamp and torch.equal(again.latents, cache.latents)


def stated() -> dict[str, list[float]]:
    """What docs/one_step.md says a cycle of each method costs, first and last."""
    rows = re.findall(
        r"^\| `(\w+)` \| \d{4}\.\d{5}.*\| ([\d., then]+) \|$",
        (ROOT / "docs" / "one_step.md").read_text(),
        re.MULTILINE,
    )
    return {name: [pytest.approx(float(cost)) for cost in told.split(", then ")] for name, told in rows}


@pytest.mark.parametrize("name", [*sorted(path.stem for path in METHODS.glob("*.yaml")), "lora"])
def test_every_method_runs(
    name: str, tiny_teacher: LatentDiffusionTeacher, world: Path, tmp_path: Path
) -> None:
    given = (
        {**method("dmd2"), "divergence": method(name)["divergence"]}
        if name == "f_distill"
        else method("dmd2" if name == "lora" else name)
    )
    if name == "lora":
        given["objective"]["critic"]["kind"] = "lora"
    if name == "dmd":
        make_pairs(
            tiny_teacher, ["a red cube", "a blue duck"], tmp_path / "pairs", PairOptions(count=4, steps=1)
        )
        given["regression"] = {
            **given["regression"],
            "pairs": str(tmp_path / "pairs"),
            "distance": "features",
        }
    small = {"batch": 2, "monitor": {"captions": 2}, "lag": {"every": 1}, "student": {"steps": 2}}
    options = build(OneStepOptions, {**small, "method": given})
    run = Run(RunOptions(str(tmp_path / "run"), 2, trackers=()), {}, name)
    task = start(run, tiny_teacher, load_judge(world / "judge"), str(world / "data"), options)
    before, frozen = weights(task), tiny_teacher.unet.conv_in.weight.clone()
    task.train()
    assert torch.equal(tiny_teacher.unet.conv_in.weight, frozen)
    assert float((weights(task) - before).abs().max()) > 0 and bool(weights(task).isfinite().all())
    said = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert said["frechet"] > 0 and said["spread"] >= 0 and task.nfe > 0
    assert name == "lora" or stated()[name] == [
        task.method.cost(share) for share in ((0.0, 0.99) if name == "progressive" else (0.0,))
    ]
    assert ("lag" in said) == (name not in ("consistency", "progressive"))


def test_the_scripts_train_and_grade(tiny_teacher_folder: Path, world: Path, tmp_path: Path) -> None:
    where = [f"teacher={tiny_teacher_folder}", f"data={world / 'data'}", f"judge={world / 'judge'}"]
    small = ["run.steps=2", "run.trackers=[]", "distill.batch=2", "distill.monitor.captions=2"]
    told = script("distill_one_step", *where, "method=f_distill", f"run.directory={tmp_path / 'run'}", *small)
    assert "pure noise is taken for t = 589" in told
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (
        result["config"]["method"]["divergence"] == "jensen_shannon"
        and result["config"]["method"]["gan"]["generator"] > 0
    )
    given = [
        "evaluation.samples=12",
        "evaluation.captions=2",
        "evaluation.each=2",
        "evaluation.neighbours=1",
        "steps=[2]",
    ]
    where.append(f"students=[{tmp_path / 'run' / 'student'}, {tmp_path / 'run' / 'student_raw'}]")
    script("evaluate_generator", *where, f"features={world / 'judge'}", *given, f"output={tmp_path / 'e'}")
    rows = [json.loads(path.read_text()) for path in sorted((tmp_path / "e").glob("*.json"))]
    assert (
        len(rows) == 3
        and {row["forwards"] for row in rows} == {1, 4}
        and all(0 <= row["recall"] <= 1 for row in rows)
    )
    shown = ["a red cube", "a blue duck", "compare=[1, 2]", "count=2", f"output={tmp_path / 's'}"]
    told = script("sample", where[0], f"student={tmp_path / 'run' / 'student'}", *shown)
    assert "teacher, 2 steps, guidance 3" in told and Image.open(tmp_path / "s" / "samples.png").size == (
        4 * 64 + 3 * 2,
        3 * 64 + 2 * 2,
    )
    assert sorted(path.name for path in (tmp_path / "s").glob("0*")) == [
        "000_00.png",
        "000_01.png",
        "001_00.png",
        "001_01.png",
    ]
    assert "is no student: give" in script(
        "sample", where[0], f"student={tiny_teacher_folder}", "a red cube", code=2
    )
    script("make_pairs", *where[:2], f"output={tmp_path / 'pairs'}", "pairs.count=4", "pairs.steps=1")
    assert (tmp_path / "pairs" / "pairs_00000.safetensors").is_file()


def test_two_processes_give_the_result_of_one(
    tiny_teacher: LatentDiffusionTeacher, world: Path, tmp_path: Path
) -> None:
    """Two batches a cycle, both by one process or one by each of two (gloo, on the CPU): the same student, to rounding."""
    where = [
        f"teacher={tiny_teacher.name_or_path}",
        f"data={world / 'data'}",
        f"judge={world / 'judge'}",
        "distill.monitor.captions=2",
    ]
    small = [
        "run.steps=3",
        "run.trackers=[]",
        "distill.batch=2",
        "distill.accumulate=2",
        "distill.warmup=1",
        "distill.learning_rate=0.01",
    ]
    script("distill_one_step", *where, *small, f"run.directory={tmp_path / 'one'}")
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [
        *several,
        str(ROOT / "scripts" / "distill_one_step.py"),
        *where,
        *small,
        f"run.directory={tmp_path / 'two'}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written: ") == 1
    states = [
        load_state(tmp_path / name / "checkpoints" / "step_00000003.safetensors")["parts"]
        for name in ("one", "two")
    ]
    for part in ("student", "critic"):
        one, two = (torch.cat([v.flatten() for v in _tensors(state[part])]) for state in states)
        start = torch.cat([p.flatten() for p in tiny_teacher.unet.parameters()])
        assert float((one[: len(start)] - two[: len(start)]).norm()) < 0.02 * float(
            (one[: len(start)] - start).norm()
        ), part


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return list(state["parameters"] if "parameters" in state else state.values())
