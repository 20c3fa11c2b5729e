"""A distillation with the options of large teachers: checkpointing, loss scaling, captions without images."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import ROOT
from PIL import Image
from torch import Tensor

from distill.data.latents import load_latents
from distill.data.prompts import load_prompts
from distill.evaluation.judge import Judge, save_judge
from distill.evaluation.judge_columns import JudgeOptions
from distill.one_step.methods.base import MethodOptions
from distill.one_step.recipe import OneStepRecipe, build_trainer, run_one_step
from distill.one_step.trainer import OneStep, OneStepOptions
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.run import RunOptions
from distill.teacher.latent import LatentDiffusionTeacher

CAPTIONS = ("a red cube", "a blue duck", "a green teapot")
LABELS = {"object": ("cube", "duck")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captioned images of noise, their captions in a text file, and an untrained judge."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
    rows = [{"file_name": f"{i}.png", "text": CAPTIONS[i % 3]} for i in range(len(noise))]
    for row, pixels in zip(rows, noise, strict=True):
        Image.fromarray(pixels).save(folder / "train" / row["file_name"])
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "captions.txt").write_text("\n".join(row["text"] for row in rows) + "\n\n")
    for name, resolution in (("judge", 64), ("large_judge", 512)):
        save_judge(Judge(LABELS, JudgeOptions(tuple(LABELS), width=8), resolution), folder / name, {})
    return folder


def method(name: str, **changes: Any) -> MethodOptions:
    values = yaml.safe_load((ROOT / "configs" / "method" / f"{name}.yaml").read_text())
    return build(MethodOptions, values | changes, name)


def recipe_of(
    teacher: LatentDiffusionTeacher, folder: Path, run: Path, method: MethodOptions, **distill: Any
) -> OneStepRecipe:
    small = {
        "batch": 4,
        "warmup": 1,
        "monitor": {"captions": 2, "real": 8},
        "critic_diagnostics": {"every": 0},
    }
    return OneStepRecipe(
        teacher=teacher.name_or_path,
        data=str(folder),
        judge=str(folder / "judge"),
        run=RunOptions(str(run), 4, trackers=()),
        method=method,
        distill=build(OneStepOptions, small | distill),
    )


def with_run(recipe: OneStepRecipe, **changes: Any) -> OneStepRecipe:
    return replace(recipe, run=replace(recipe.run, **changes))


def flat(tensors: Any) -> Tensor:
    return torch.cat([value.detach().flatten() for value in tensors])


def weights(trainer: OneStep) -> Tensor:
    critic = trainer.method.critic
    return flat([*trainer.student.parameters(), *([] if critic is None else critic.parameters())])


@pytest.mark.parametrize("name", ["dmd2", "sid", "consistency"])
def test_checkpointing_changes_no_bit(
    name: str, tiny_teacher: LatentDiffusionTeacher, folder: Path, tmp_path: Path
) -> None:
    """Recomputed activations give the same gradients of student and critic, frozen parts included."""
    results = []
    for checkpointing in (False, True):
        recipe = recipe_of(tiny_teacher, folder, tmp_path / str(checkpointing), method(name))
        trainer = build_trainer(with_run(recipe, gradient_checkpointing=checkpointing))
        network = trainer.student.denoiser.network
        assert network.is_gradient_checkpointing == checkpointing
        for step in range(2):
            trainer.cycle(step)
        results.append(weights(trainer))
    assert torch.equal(*results)


def test_a_lora_critic_in_the_gradients_path_cannot_be_recomputed(
    tiny_teacher: LatentDiffusionTeacher, folder: Path, tmp_path: Path
) -> None:
    objective = {**yaml.safe_load((ROOT / "configs/method/dmd2.yaml").read_text())["objective"]}
    objective["critic"] = {"kind": "lora"}
    for gan, message in (({}, "cannot recompute a LoRA critic"), (None, None)):
        recipe = recipe_of(
            tiny_teacher, folder, tmp_path / str(gan), method("dmd2", objective=objective, gan=gan)
        )
        recipe = with_run(recipe, gradient_checkpointing=True)
        if message is None:
            assert build_trainer(recipe).cycle(0)[1]
        else:
            with pytest.raises(UserError, match=message):
                build_trainer(recipe)


def test_float16_skips_updates_that_overflow_without_a_roll_back(
    tiny_teacher: LatentDiffusionTeacher, folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_teacher, folder, tmp_path, method("dmd2"), learning_rate=1e-3)
    trainer = build_trainer(with_run(recipe, precision="float16"))
    scaler = trainer.run.scaler
    assert scaler is not None
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
    before = flat(trainer.student.parameters())
    metrics, finite = trainer.cycle(0)
    assert finite and torch.equal(before, flat(trainer.student.parameters()))
    assert scaler.get_scale() < 2.0**40 and all(np.isfinite(float(value)) for value in metrics.values())

    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**6})
    assert trainer.cycle(1)[1]
    assert not torch.equal(before, flat(trainer.student.parameters()))
    scaler.load_state_dict({**scaler.state_dict(), "scale": 0.5})
    assert not trainer.cycle(2)[1]  # no scale is small enough


def test_critic_updates_in_half_precision_see_the_last_update(
    tiny_teacher: LatentDiffusionTeacher, folder: Path, tmp_path: Path
) -> None:
    """Three updates in one call are three calls: autocast must not reuse its copies of older weights."""
    results = []
    for split in (False, True):
        recipe = recipe_of(tiny_teacher, folder, tmp_path / str(split), method("dmd2"))
        trainer = build_trainer(with_run(recipe, precision="bfloat16"))
        parts = trainer.accumulate_gradients(0)
        for updates in (1, 1, 1) if split else (3,):
            trainer.method.update_critic(parts, 0.0, updates)
        results.append(weights(trainer))
    assert torch.equal(*results)


def test_the_students_gradient_is_clipped(
    tiny_teacher: LatentDiffusionTeacher, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By plain descent: the update is the learning rate times the norm at most."""
    recipe = recipe_of(tiny_teacher, folder, tmp_path, method("diff_instruct"), max_norm=0.5)
    trainer = build_trainer(recipe)
    trainer.optimizer = torch.optim.SGD(trainer.student.parameters(), lr=0.1)
    before = flat(trainer.student.parameters())
    trainer.cycle(0)
    moved = float((flat(trainer.student.parameters()) - before).norm())
    assert moved == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_captions_alone_serve_a_method_without_data(
    tiny_teacher: LatentDiffusionTeacher, folder: Path, tmp_path: Path
) -> None:
    captions = folder / "captions.txt"
    recipe = recipe_of(tiny_teacher, folder, tmp_path / "run", method("sid"), ema=None, monitor={"every": 0})
    recipe = replace(recipe, data=str(captions), judge=None)
    assert run_one_step(with_run(recipe, preview_every=2)) == {}
    assert (tmp_path / "run" / "student" / "unet").is_dir() and not (
        tmp_path / "run" / "student_raw"
    ).exists()
    assert len(list((tmp_path / "run" / "previews").iterdir())) == 2

    for changed in (replace(recipe, method=method("dmd2")), replace(recipe, distill=OneStepOptions())):
        with pytest.raises(
            UserError, match=r"captions\.txt holds captions alone, and .* set method.gan=null"
        ):
            build_trainer(with_run(changed, directory=str(tmp_path / "other"), overwrite=True))
    missing = with_run(replace(recipe, data=str(tmp_path / "none.txt")), directory=str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"none\.txt cannot be read"):
        build_trainer(missing)


def test_streamed_data_equals_the_cache(tiny_teacher: LatentDiffusionTeacher, folder: Path) -> None:
    cached, streamed = load_latents(tiny_teacher, folder), load_prompts(tiny_teacher, folder, images=True)
    indices = torch.tensor([7, 0, 11])
    assert len(streamed) == len(cached) == 12
    torch.testing.assert_close(streamed.latents_of(indices), cached.latents_of(indices), rtol=2e-3, atol=2e-3)
    assert streamed.latents_of(indices).dtype == cached.latents_of(indices).dtype == torch.float32
    for left, right in (
        (streamed.conditioning_of(indices), cached.conditioning_of(indices)),
        (streamed.uncond, cached.uncond),
    ):
        torch.testing.assert_close(left.embedding, right.embedding, rtol=2e-3, atol=2e-3)
    assert load_prompts(tiny_teacher, folder / "captions.txt", images=False).captions == streamed.captions


def test_a_judge_of_another_resolution_is_refused(
    tiny_teacher: LatentDiffusionTeacher, folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_teacher, folder, tmp_path, method("diff_instruct"))
    recipe = replace(recipe, judge=str(folder / "large_judge"))
    with pytest.raises(
        UserError, match="knows images of 512 pixels and the teacher's have 64: give judge=null"
    ):
        build_trainer(recipe)


def test_the_monitor_grades_in_chunks(
    tiny_teacher: LatentDiffusionTeacher, folder: Path, tmp_path: Path
) -> None:
    figures = []
    for chunk in (None, 3):
        monitor = {"captions": 4, "real": 8, "chunk": chunk}
        recipe = recipe_of(tiny_teacher, folder, tmp_path / str(chunk), method("sid"), monitor=monitor)
        trainer = build_trainer(recipe)
        assert trainer.monitor is not None
        figures.append(trainer.monitor.evaluate(trainer.samples()))
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)


def test_rates_drop_and_the_discriminator_starts_late(
    tiny_teacher: LatentDiffusionTeacher, folder: Path, tmp_path: Path
) -> None:
    options = method("dmd2", gan={"start": 0.5})
    recipe = recipe_of(tiny_teacher, folder, tmp_path, options, drop_at=0.75, final_lr_scale=0.05)
    trainer = build_trainer(recipe)
    rates, metrics = [], []
    for step in range(4):
        trainer.set_learning_rates(step)
        rates.append(trainer.optimizer.param_groups[0]["lr"] / recipe.distill.learning_rate)
        metrics.append(trainer.cycle(step)[0])
    assert rates == pytest.approx([1, 1, 1, 0.05])
    assert ["gan" in values for values in metrics] == [False, False, True, True]
    assert [float(values["discriminator"]) > 0 for values in metrics] == [False, False, True, True]
    assert trainer.method.cost(0.0) == pytest.approx(12) and trainer.method.cost(0.5) == pytest.approx(15.2)
    with pytest.raises(UserError, match="from the start: set gan.start=0"):
        method("dmd2", gan={"start": 0.5}, divergence="forward_kl")


@pytest.mark.slow
def test_compiled_networks_agree_with_eager_ones(
    tiny_teacher: LatentDiffusionTeacher, folder: Path, tmp_path: Path
) -> None:
    """The discriminator's hooks on the critic's bottleneck are still reached."""
    results = []
    for choice in ("off", "on"):
        recipe = recipe_of(tiny_teacher, folder, tmp_path / choice, method("dmd2"))
        trainer = build_trainer(with_run(recipe, compile=choice))
        before = weights(trainer)
        metrics = trainer.cycle(0)[0]
        assert float(metrics["discriminator"]) > 0
        results.append(weights(trainer) - before)
    assert float(torch.cosine_similarity(*results, dim=0)) > 0.99
