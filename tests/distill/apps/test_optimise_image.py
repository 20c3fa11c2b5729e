"""Images optimised by every loss: initial values, resuming, editing, diagnostics, and errors."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from command_line import ROOT
from PIL import Image
from precision_checks import assert_float32_checkpoints
from torch.amp import GradScaler

from distill.apps.optimise_image import OptimiseImage, OptimiseImageOptions
from distill.core.teacher import Teacher
from distill.data.images import load_image
from distill.objectives.algebra import DistillationOutput
from distill.objectives.diagnostics import DiagnosticOptions
from distill.objectives.options import ObjectiveOptions, Term
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.precision import DTYPES, PrecisionName
from distill.runtime.run import Run, RunOptions
from distill.teacher.latent import load_latent_diffusion

OBJECTIVES = ROOT / "configs" / "objective"
SDS = ObjectiveOptions((Term("teacher", guidance=3.0), Term("noise", -1.0)))
OPTIONS = OptimiseImageOptions("a red cube", particles=2)


def run(directory: Path, steps: int = 2) -> Run:
    return Run(RunOptions(str(directory), steps, checkpoint_every=1, trackers=()), {}, "optimise_image")


def objective(name: str) -> ObjectiveOptions:
    """The options of a file in configs/objective."""
    return build(ObjectiveOptions, yaml.safe_load((OBJECTIVES / f"{name}.yaml").read_text()), "objective")


@pytest.fixture
def source(tmp_path: Path) -> str:
    """The file of a red image."""
    path = tmp_path / "red.png"
    Image.new("RGB", (64, 64), (200, 30, 30)).save(path)
    return str(path)


@pytest.mark.parametrize("name", sorted({path.stem for path in OBJECTIVES.glob("*.yaml")} - {"sds_perp_neg"}))
def test_every_loss_updates_the_particles(
    name: str, tmp_path: Path, tiny_teacher: Teacher, source: str
) -> None:
    options = replace(OPTIONS, source=source, source_prompt="a blue cube")
    task = OptimiseImage(run(tmp_path / "run"), tiny_teacher, objective(name), options)
    before = task.particles.detach().clone()
    images = task.train()
    assert images.shape == (2, 3, 64, 64) and len(task.frames) == 2
    distance = (task.particles.detach() - before).abs().mean()
    assert 1e-3 < float(distance) <= 2 * OPTIONS.learning_rate * 1.5


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted({path.stem for path in OBJECTIVES.glob("*.yaml")} - {"sds_perp_neg"}))
def test_every_loss_in_half_precision(
    name: str, precision: PrecisionName, tmp_path: Path, tiny_teacher_folder: Path, source: str
) -> None:
    """The teacher's weights are half, the particles, the critic and all moments float32."""
    teacher = load_latent_diffusion(str(tiny_teacher_folder), dtype=DTYPES[precision])
    options = replace(OPTIONS, source=source, source_prompt="a blue cube")
    precise = replace(run(tmp_path / "first").options, directory=str(tmp_path / "run"), precision=precision)
    task = OptimiseImage(Run(precise, {}, "optimise_image"), teacher, objective(name), options)
    assert task.train().isfinite().all()
    assert_float32_checkpoints(tmp_path / "run")


def test_float16_with_a_critic_resumes_bit_for_bit(tmp_path: Path, tiny_teacher_folder: Path) -> None:
    """The loss scale, lowered by overflows from a start that is too high, is part of the checkpoint."""
    results = []
    for cut in (False, True):
        for steps in (4, 8) if cut else (8,):
            teacher = load_latent_diffusion(str(tiny_teacher_folder), dtype=torch.float16)
            options = RunOptions(
                str(tmp_path / f"run{cut}"), steps, checkpoint_every=2, trackers=(), precision="float16"
            )
            resumed = Run(options, {}, "optimise_image")
            assert resumed.scaler is not None
            resumed.scaler = GradScaler("cpu", init_scale=2.0**40)
            task = OptimiseImage(resumed, teacher, objective("vsd"), replace(OPTIONS, space="pixel"))
            images = task.train()
        assert resumed.scaler.get_scale() < 2.0**40
        results.append(images)
    assert torch.equal(*results)


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_start_source_begins_with_the_source_image(
    space: Literal["latent", "pixel"], tmp_path: Path, tiny_teacher: Teacher, source: str
) -> None:
    options = replace(OPTIONS, space=space, start="source", source=source)
    task = OptimiseImage(run(tmp_path / "run"), tiny_teacher, SDS, options)
    image = load_image(source, 64)
    # of one image: an untrained VAE magnifies a batch's rounding
    latents = tiny_teacher.encode_images(image).expand(2, -1, -1, -1)
    expected = image.expand(2, -1, -1, -1) if space == "pixel" else tiny_teacher.decode(latents)
    torch.testing.assert_close(task.images(), expected, atol=1e-4, rtol=0)
    task.step(0.0)
    assert float((task.images() - expected).detach().abs().max()) > 1e-4


def test_resumes_to_the_same_images(
    tmp_path: Path, tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = OptimiseImage(run(tmp_path / "whole", 3), tiny_teacher, SDS, OPTIONS).train()
    step = OptimiseImage.step
    count = iter(range(9))

    def interrupted_step(self: OptimiseImage, progress: float) -> DistillationOutput:
        if next(count) == 2:
            raise RuntimeError("power cut")
        return step(self, progress)

    monkeypatch.setattr(OptimiseImage, "step", interrupted_step)
    with pytest.raises(RuntimeError, match="power cut"):
        OptimiseImage(run(tmp_path / "broken", 3), tiny_teacher, SDS, OPTIONS).train()
    resumed = OptimiseImage(run(tmp_path / "broken", 3), tiny_teacher, SDS, OPTIONS).train()
    assert torch.equal(resumed, expected)


def test_transparent_source_is_composited_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(str(tmp_path / "clear.png"), 4, background=1.0).min() == 1


def test_invalid_options(tmp_path: Path, tiny_teacher: Teacher, source: str) -> None:
    with pytest.raises(UserError, match="give source=picture.png and source_prompt"):
        OptimiseImage(run(tmp_path / "a"), tiny_teacher, objective("dds"), replace(OPTIONS, source=source))
    with pytest.raises(UserError, match="unknown word"):
        OptimiseImage(run(tmp_path / "b"), tiny_teacher, SDS, replace(OPTIONS, prompt="a zebra"))
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(UserError, match="cannot be read as an image"):
        load_image(str(tmp_path / "no.png"), 8)
    with pytest.raises(UserError, match="needs an image"):
        replace(OPTIONS, start="source")


def test_diagnostics_do_not_change_the_run(tmp_path: Path, tiny_teacher: Teacher) -> None:
    expected = OptimiseImage(run(tmp_path / "plain"), tiny_teacher, SDS, OPTIONS).train()
    options = replace(OPTIONS, diagnostics=DiagnosticOptions(every=2, levels=3, draws=2))
    diagnosed = OptimiseImage(run(tmp_path / "diagnosed"), tiny_teacher, SDS, options).train()
    assert torch.equal(diagnosed, expected)
    names = ["step_00000002.json", "step_00000002.png", "x0_00000002.png"]
    assert sorted(path.name for path in (tmp_path / "diagnosed" / "diagnostics").iterdir()) == names
