"""The trainer: its stages and their checks, convergence, resume, learning rates."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import pytest
import torch
import yaml
from command_line import ROOT
from scene_fixtures import (
    DISTILLATION,
    NO_REGULARIZERS,
    OPTIONS,
    SDS,
    SMALL,
    ZERO_GRADIENT,
    OneImageTeacher,
    disc,
    run_options,
    with_stages,
)

from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.run import Run
from distill.teacher.latent import LatentDiffusionTeacher
from distill.teacher.load import load_teacher
from sds3d.scene.cameras import orbit
from sds3d.scene.protocol import RenderedViews
from sds3d.text_to_3d.context import TextTo3dContext
from sds3d.text_to_3d.stages.base import Stage, StageOptions
from sds3d.text_to_3d.stages.orientation import OrientationCheck, OrientationOptions
from sds3d.text_to_3d.stages.score_distillation import ScoreDistillationOptions, ScoreDistillationStage
from sds3d.text_to_3d.stages.sdedit_refinement import SDEditRefinementOptions
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions, check_inputs


def trainer(directory: Path, steps: int, options: TextTo3dOptions = OPTIONS) -> TextTo3d:
    return TextTo3d(Run(run_options(directory, steps), {}, "t"), OneImageTeacher(disc()), SMALL, SDS, options)


def test_scene_converges_to_teacher_mean(tmp_path: Path) -> None:
    scene = trainer(tmp_path, 120).train()
    angles = ([0.0, 120.0], [0.0, 30.0], [3.0, 3.0], [35.0, 35.0])
    views = scene.render(orbit(*map(torch.tensor, angles), 16), torch.full((2, 3), 0.5))
    assert (views.rgb - disc()).abs().mean() < 0.08  # a constant grey has 0.14
    centre = views.rgb[:, :, 7:9, 7:9].mean((0, 2, 3))
    assert centre[0] > 0.6 and centre[1:].max() < 0.35


def test_interrupted_run_resumes_to_same_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trainer(tmp_path / "whole", 6).train()
    interrupted = trainer(tmp_path / "interrupted", 6)
    update = ScoreDistillationStage.update

    def fail_at_step_4(self: ScoreDistillationStage, step: int, progress: float) -> RenderedViews:
        if step == 4:
            raise RuntimeError("power cut")
        return update(self, step, progress)

    monkeypatch.setattr(ScoreDistillationStage, "update", fail_at_step_4)
    with pytest.raises(RuntimeError, match="power cut"):
        interrupted.train()
    monkeypatch.setattr(ScoreDistillationStage, "update", update)
    resumed = trainer(tmp_path / "interrupted", 6).train()
    for name, value in expected.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_config_and_python_have_the_same_defaults() -> None:
    group = yaml.safe_load((ROOT / "configs" / "text_to_3d.yaml").read_text())["text_to_3d"]
    assert build(TextTo3dOptions, {**group, "prompt": "a red teapot"}) == TextTo3dOptions("a red teapot")
    recipe = yaml.safe_load((ROOT / "configs" / "recipe" / "score_distillation.yaml").read_text())
    stages = build(TextTo3dOptions, {**recipe["text_to_3d"], "prompt": "x"}).stages
    defaults = (ScoreDistillationOptions(), OrientationOptions(), SDEditRefinementOptions())
    names = ("score_distillation", "orientation", "sdedit_refinement")
    assert stages == dict(zip(names, defaults, strict=True))  # in this order


def test_one_option_of_a_stage_is_overridden_and_a_stage_removed() -> None:
    values = {"prompt": "x", "stages": {"sampled_views": {"strengths": [1.0]}}, "camera": {"fovy": [40, 40]}}
    options = build(TextTo3dOptions, values)
    assert options.stages == {"sampled_views": SDEditRefinementOptions((1.0,), start=0.0, views=48)}
    with pytest.raises(UserError, match="none updates the scene from the first step"):
        build(TextTo3dOptions, {"prompt": "x", "stages": {"sampled_views": None}})
    assert options.camera.elevation == (-10.0, 70.0) and options.camera.fovy == (40.0, 40.0)
    with pytest.raises(UserError, match="camera.resolution is not an option"):
        build(TextTo3dOptions, {"prompt": "x", "camera": {"resolution": 64}})


def test_later_stages_take_over(tmp_path: Path) -> None:
    options = with_stages(
        OPTIONS,
        orientation=OrientationOptions((OrientationCheck(0.2),)),
        sdedit_refinement=SDEditRefinementOptions((0.6, 0.5), start=0.6),
    )
    task = trainer(tmp_path, 10, options)
    assert task.updates["score_distillation"] == range(0, 6)
    assert not task.updates["orientation"]
    assert task.updates["sdedit_refinement"] == range(6, 10)


def test_a_run_too_short_for_refinement_is_continued_with_more_steps(tmp_path: Path) -> None:
    refinement = SDEditRefinementOptions((0.5,), start=0.9, views=2, steps=2)
    options = with_stages(OPTIONS, sdedit_refinement=refinement)
    short = trainer(tmp_path, 1, options)
    assert not refinement.rounds(1)
    short.train()
    longer = trainer(tmp_path, 4, options)
    longer.train()
    assert longer.run.step == 4 and longer.updates["sdedit_refinement"] == range(4, 4)


@final
@dataclass(frozen=True)
class Counting(StageOptions):
    """A stage of a recipe: takes over at a fraction of the run and counts its updates."""

    start: float = 0.5

    @property
    def updates_from(self) -> float | None:
        return self.start

    def build(self, context: TextTo3dContext) -> "CountingStage":
        return CountingStage(context)


@final
class CountingStage(Stage):
    def __init__(self, context: TextTo3dContext) -> None:
        self.context, self.progress = context, []

    def update(self, step: int, progress: float) -> RenderedViews:
        self.progress.append(progress)
        cameras = orbit(*(torch.tensor([value]) for value in (0.0, 0.0, 3.0, 35.0)), 16)
        return self.context.scene.render(cameras, torch.full((1, 3), 0.5))

    def nfe(self, updates: int) -> int:
        return 0


def test_new_stage_is_one_class_and_one_config_entry(tmp_path: Path) -> None:
    task = trainer(tmp_path, 8, with_stages(OPTIONS, counting=Counting()))
    task.train()
    assert task.stages["counting"].progress == [0.0, 0.25, 0.5, 0.75]
    assert task.nfe == task.teacher.nfe == 2 * 4


def test_mistakes_raise_before_the_run(tiny_teacher: LatentDiffusionTeacher) -> None:
    with pytest.raises(UserError, match="'blob'"):
        check_inputs(tiny_teacher, replace(OPTIONS, prompt="a red blob"))
    with pytest.raises(UserError, match="'blob'"):
        check_inputs(tiny_teacher, replace(OPTIONS, prompt="a red cube", negative_prompt="blob"))
    with pytest.raises(UserError, match="empty"):
        check_inputs(tiny_teacher, replace(OPTIONS, prompt=" "))
    with pytest.raises(UserError, match="views is 0"):
        replace(OPTIONS, views=0)
    with pytest.raises(UserError, match="background"):
        replace(OPTIONS, background=(0.9, 0.1))
    with pytest.raises(UserError, match="coarse_until is 2"):
        replace(DISTILLATION, coarse_until=2.0)
    with pytest.raises(UserError, match=r"of the stages \[orientation\] none updates the scene"):
        replace(OPTIONS, stages={"orientation": OrientationOptions()})
    with pytest.raises(UserError, match=r"checked at 0.6 of the run, but .* from 0.5 on"):
        with_stages(
            OPTIONS,
            orientation=OrientationOptions((OrientationCheck(0.6),)),
            refinement=SDEditRefinementOptions(start=0.5),
        )
    views_alone = SDEditRefinementOptions((1.0, 0.5), start=0.0)
    with pytest.raises(
        UserError, match=r"score_distillation never .* refinement takes over at 0 .*distillation=null"
    ):
        with_stages(OPTIONS, refinement=views_alone)
    replace(OPTIONS, stages={"refinement": views_alone})


def test_views_sampled_from_noise_need_cameras_or_a_mesh(
    tiny_teacher: LatentDiffusionTeacher, multi_view_teacher_folder: Path
) -> None:
    options = replace(
        OPTIONS, prompt="a red cube", stages={"views": SDEditRefinementOptions((1.0,), start=0.0)}
    )
    with pytest.raises(
        UserError, match="views samples all views .* not conditioned on cameras.*recipe=score_dist"
    ):
        check_inputs(tiny_teacher, options)
    check_inputs(tiny_teacher, options, control=True)
    check_inputs(load_teacher(str(multi_view_teacher_folder)), options)
    refined = replace(options, stages={"views": SDEditRefinementOptions((0.9,), start=0.0)})
    check_inputs(tiny_teacher, refined)  # of the initial scene: its middle is dense


@pytest.mark.parametrize(
    "name",
    ["opacity", "entropy", "orientation", "depth_variance", "sparsity", "smooth_density", "smooth_albedo"],
)
def test_every_regularizer_changes_the_scene(tmp_path: Path, name: str) -> None:
    weights = replace(NO_REGULARIZERS, **{name: 1.0}, samples=256)
    run = Run(run_options(tmp_path, 2), {}, "t")
    options = replace(OPTIONS, regularizers=weights)
    task = TextTo3d(run, OneImageTeacher(disc()), SMALL, ZERO_GRADIENT, options)
    with torch.no_grad():  # a scene that is not uniform, which smoothness terms need
        for parameter in task.scene.field.encoding.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    before = [parameter.detach().clone() for parameter in task.scene.field.parameters()]
    task.stages["score_distillation"].sds_step(0, 0.5)
    assert any(not torch.equal(a, b) for a, b in zip(before, task.scene.field.parameters(), strict=True))
