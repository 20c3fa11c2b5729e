"""SDEdit refinement: rounds and their NFE, resampled views, the fitted scene, resume within the stage."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scene_fixtures import OPTIONS, SDS, SMALL, ZERO_GRADIENT, OneImageTeacher, disc, run_options, with_stages

from distill.objectives.options import ObjectiveOptions
from distill.runtime.errors import UserError
from distill.runtime.run import Run
from sds3d.scene.cameras import orbit, ring
from sds3d.scene.protocol import RenderedViews
from sds3d.text_to_3d.stages.orientation import OrientationCheck, OrientationOptions
from sds3d.text_to_3d.stages.sdedit_refinement import (
    RefinedViews,
    SDEditRefinementOptions,
    SDEditRefinementStage,
    background_of,
)
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions

REFINEMENT = SDEditRefinementOptions((1.0, 0.5), start=0.5, views=6, steps=10, guidance=1.0)
REFINED = with_stages(OPTIONS, sdedit_refinement=REFINEMENT)


def trainer(
    directory: Path,
    steps: int,
    objective: ObjectiveOptions = ZERO_GRADIENT,
    options: TextTo3dOptions = REFINED,
) -> TextTo3d:
    run = Run(run_options(directory, steps), {}, "t")
    return TextTo3d(run, OneImageTeacher(disc()), SMALL, objective, options)


def test_rounds_divide_the_rest_of_a_run() -> None:
    def rounds(steps: int, start: float, *strengths: float) -> dict[int, float]:
        return SDEditRefinementOptions(strengths, start=start).rounds(steps)

    assert rounds(600, 0.7, 0.6, 0.5, 0.4) == {420: 0.6, 480: 0.5, 540: 0.4}
    assert rounds(600, 0.8) == {}
    assert rounds(2, 0.5, 0.6, 0.5, 0.4) == {1: 0.4}  # too short for more
    assert rounds(2, 0.8, 0.6, 0.5) == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"strengths": (1.5,)},
        {"strengths": (0.01,)},
        {"strengths": (0.5,), "steps": 0},
        {"start": 1.0},
        {"views": 0},
        {"weight": 0.0},
    ],
)
def test_options_out_of_range_raise(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match="sdedit_refinement"):
        replace(REFINEMENT, **wrong)


def test_mistakes_raise_before_the_run() -> None:
    with pytest.raises(UserError, match=r"camera elevation is \[50, 10\]"):
        SDEditRefinementOptions(elevation=(50, 10))
    with pytest.raises(UserError, match="refinement relies on the pose"):
        with_stages(REFINED, orientation=OrientationOptions((OrientationCheck(0.6),)))


def test_resampled_views_approach_the_teacher(tmp_path: Path) -> None:
    """At strength 1 the image is the teacher's, below it keeps parts of the scene; prompts are by view."""
    task = trainer(tmp_path, 10)
    stage = task.stages["sdedit_refinement"]
    error = {}
    for strength in (1.0, 0.1):
        stage.resample_views(strength)
        error[strength] = float((stage.refined.images - disc()).abs().mean())
    assert error[1.0] < 0.04 < error[0.1]
    prompts = task.teacher.prompts
    assert any("back view" in prompt for prompt in prompts) and "" in prompts
    assert (tmp_path / "previews").is_dir()


def test_scene_is_fitted_with_the_stated_nfe(tmp_path: Path) -> None:
    task = trainer(tmp_path, 120, SDS)
    assert task.updates["score_distillation"] == range(60)
    scene = task.train()
    camera = orbit(*(torch.tensor([v]) for v in (0.0, 0.0, 3.0, 35.0)), 16)
    front = scene.render(camera, torch.full((1, 3), 0.5)).rgb
    assert (front - disc()).abs().mean() < 0.05
    assert task.teacher.nfe == task.nfe == 2 * 60 + 6 * (10 + 5)


def test_orientation_checks_run_with_the_stated_nfe(tmp_path: Path) -> None:
    checks = (OrientationCheck(0.1), OrientationCheck(0.3, draws=3))
    options = with_stages(REFINED, orientation=OrientationOptions(checks, views=4))
    task = trainer(tmp_path, 20, options=options)
    assert task.stages["orientation"].checks == dict(zip((2, 6), checks, strict=True))
    task.train()
    assert task.teacher.nfe == task.nfe == 4 * 5 * 3 * (2 + 3) + 6 * (10 + 5)


def test_with_a_zero_gradient_only_refinement_changes_the_scene(tmp_path: Path) -> None:
    task = trainer(tmp_path, 40)
    weight = task.scene.field.mlp[0].weight
    before = weight.detach().clone()
    task.stages["score_distillation"].sds_step(0, 0.1)
    assert torch.equal(weight, before)
    stage = task.stages["sdedit_refinement"]
    stage.resample_views(1.0)
    for step in range(30):
        views = stage.refine_step(step)
    assert not torch.equal(weight, before)
    assert (views.rgb - disc()).abs().mean() < 0.08


def test_run_interrupted_in_refinement_resumes_to_same_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trainer(tmp_path / "whole", 12).train()
    refine_step = SDEditRefinementStage.refine_step

    def fail_at_step_10(self: SDEditRefinementStage, step: int) -> RenderedViews:
        if step == 10:
            raise RuntimeError("power cut")
        return refine_step(self, step)

    monkeypatch.setattr(SDEditRefinementStage, "refine_step", fail_at_step_10)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path / "interrupted", 12).train()
    monkeypatch.setattr(SDEditRefinementStage, "refine_step", refine_step)
    resumed = trainer(tmp_path / "interrupted", 12).train()
    for name, value in expected.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_views_are_stored_with_their_cameras() -> None:
    stored, cameras = RefinedViews(5, 8), ring(5, 20.0, 8)
    images = torch.rand(5, 3, 8, 8)
    stored.replace(cameras, torch.rand(5, 3), images)
    sampled, background, chosen = stored.sample(3, torch.Generator().manual_seed(0))
    for row in range(3):
        index = int((images == chosen[row]).all(-1).all(-1).all(-1).nonzero())
        assert sampled.azimuth[row] == cameras.azimuth[index]
        assert torch.equal(sampled.rays()[0][row], cameras.rays()[0][index])
        assert torch.equal(background[row], stored.background[index])
    loaded = RefinedViews(5, 8)
    loaded.load_state_dict(stored.state_dict())
    assert torch.equal(loaded.images, images)


def test_background_is_read_off_a_plain_border() -> None:
    grey = torch.full((3, 3, 16, 16), 0.4) + 0.01 * torch.rand(3, 3, 16, 16)
    grey[1, :, 4:12, :9] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]  # an object at the left border
    grey[2] = torch.rand(3, 16, 16)
    expected = torch.full((3, 3), 0.9)
    read = background_of(grey, expected)
    assert (read[:2] - 0.405).abs().max() < 0.005
    assert torch.equal(read[2], expected[2])


def test_scene_is_fitted_over_the_backgrounds_that_the_teacher_chose(tmp_path: Path) -> None:
    """Views sampled outright are on the teacher's background; fitted over another, the scene is fog."""
    stage = trainer(tmp_path, 10).stages["sdedit_refinement"]
    stage.resample_views(1.0)
    border = disc()[:, 0, 0]
    assert (stage.refined.background - border).abs().max() < 0.05
