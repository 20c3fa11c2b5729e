"""Image to 3D: the picture as a condition of every view, the loss of its own view, resume, mistakes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import ROOT, script
from entry import load_script
from PIL import Image
from scene_fixtures import OPTIONS, SDS, SMALL, ZERO_GRADIENT, OneImageTeacher, disc, run_options, with_stages
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.score import Prediction
from distill.core.views import POSE, REFERENCE, REFERENCE_POSE
from distill.objectives.options import LinearSchedule, ObjectiveOptions
from distill.planning.plan import make_plan
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.run import Run
from sds3d.planning import text_to_3d_subject
from sds3d.text_to_3d import reference_view
from sds3d.text_to_3d.alignment import Alignment, picture_camera
from sds3d.text_to_3d.mesh_control import MeshControlOptions
from sds3d.text_to_3d.picture import CutOut, Frame
from sds3d.text_to_3d.recipe import TextTo3dRecipe, start_text_to_3d
from sds3d.text_to_3d.reference_view import ImageTo3dOptions, ReferenceView
from sds3d.text_to_3d.stages import sdedit_refinement
from sds3d.text_to_3d.stages.base import StageOptions
from sds3d.text_to_3d.stages.orientation import OrientationCheck, OrientationOptions
from sds3d.text_to_3d.stages.score_distillation import ScoreDistillationStage
from sds3d.text_to_3d.stages.sdedit_refinement import SDEditRefinementOptions
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions, check_inputs

GROUPED = replace(
    OPTIONS, prompt="", views=6, views_per_group=3, group_layout="random", background=(0.4, 0.9)
)
AXIS = np.linspace(-1, 1, 64)
INSIDE = (np.hypot(AXIS, AXIS[:, None]) < 0.9).astype(float)
CUT_OUT = CutOut(np.broadcast_to(np.array([0.9, 0.1, 0.1]), (64, 64, 3)), INSIDE, "a picture")
PICTURE = CUT_OUT.picture(16)
ELEVATION = 20.0
WEIGHTS = ImageTo3dOptions(ELEVATION)


class PictureTeacher(OneImageTeacher):
    """A teacher in pixel space that is conditioned on cameras and pictures; it records its calls."""

    conditioned_on_cameras = True

    def __init__(self) -> None:
        super().__init__(disc())
        self.calls: list[tuple[Tensor, Conditioning]] = []  # x_t and the conditioning

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        self.calls.append((x_t, conditioning))
        return super().predict(x_t, t, conditioning)


def trainer(
    directory: Path,
    options: TextTo3dOptions = GROUPED,
    steps: int = 4,
    objective: ObjectiveOptions = SDS,
    weights: ImageTo3dOptions = WEIGHTS,
    elevation: float = ELEVATION,
) -> TextTo3d:
    teacher = PictureTeacher()
    reference = ReferenceView(teacher, None, CUT_OUT, elevation, weights)
    run = Run(run_options(directory, steps), {}, "t")
    return TextTo3d(run, teacher, SMALL, objective, options, reference=reference)


def check_pictures(conditioning: Conditioning, given: Tensor) -> None:
    """Every row has the picture over its group's own grey, or NaN; and the pose of the picture's camera."""
    extras = conditioning.extras
    assert conditioning.views == 3
    missing = extras[REFERENCE].isnan().flatten(1)
    assert torch.equal(missing.all(1), ~given) and torch.equal(missing.any(1), ~given)
    pictures = extras[REFERENCE][given]
    greys = pictures[:, :, 0, 0]
    torch.testing.assert_close(pictures, PICTURE.over(greys))
    assert torch.equal(greys[::3], greys[1::3]) and len(greys[:, 0].unique()) > 1
    pose = picture_camera(0.0, ELEVATION, 16).view_poses()
    torch.testing.assert_close(extras[REFERENCE_POSE], pose.expand(len(conditioning), -1))


# The condition


@pytest.mark.parametrize("name", ["sds_picture", "sds_pixels", "csd", "nfsd"])
def test_all_but_the_unconditional_rows_have_the_picture(name: str, tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "configs" / "objective" / f"{name}.yaml").read_text())
    objective = build(ObjectiveOptions, values, "objective")
    task = trainer(tmp_path, replace(GROUPED, negative_prompt="blurry"), objective=objective)
    task.stages["score_distillation"].sds_step(0, 0.9)
    ((x_t, conditioning),) = task.teacher.calls
    prompts = [prompt for part in objective.components for _, prompt in part.queries("teacher", 0.9)]
    given = torch.tensor([prompt == "conditional" for prompt in prompts]).repeat_interleave(6)
    assert len(x_t) == 6 * len(prompts) and not given.all()
    check_pictures(conditioning, given)
    assert set(task.teacher.prompts) <= {"", "blurry"}  # no view words


def test_the_picture_lies_over_the_greys_of_the_views(tmp_path: Path) -> None:
    context = trainer(tmp_path).context
    background = context.backgrounds(6)
    cameras = context.sample_cameras(GROUPED.camera, 6, 16)
    conditioning = context.prompt_conditionings(cameras, background).by_name["conditional"]
    torch.testing.assert_close(conditioning.extras[REFERENCE][:, :, 0, 0], background)


def test_refinement_guides_by_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdedit_refinement, "CHUNK", 7)
    monkeypatch.setattr(sdedit_refinement, "background_of", lambda images, expected: expected)
    stage = SDEditRefinementOptions((0.5,), start=0.5, views=12, steps=4)
    task = trainer(tmp_path, with_stages(GROUPED, sdedit_refinement=stage))
    task.stages["sdedit_refinement"].resample_views(0.5)
    assert [len(x_t) for x_t, _ in task.teacher.calls] == [12] * 4  # two chunks of six, with and without
    greys = []
    for _, conditioning in task.teacher.calls:
        check_pictures(conditioning, torch.arange(12) >= 6)
        uncond, cond = conditioning.extras[POSE].chunk(2)
        assert torch.equal(uncond, cond)
        greys.append(conditioning.extras[REFERENCE][6:, :, 0, 0])
    refined = task.stages["sdedit_refinement"].refined
    assert torch.equal(torch.cat(greys[::2]), refined.background)


def test_a_picture_fixes_the_orientation(tmp_path: Path) -> None:
    orientation = OrientationOptions((OrientationCheck(0.5),), views=6)
    task = trainer(tmp_path, with_stages(GROUPED, orientation=orientation))
    assert not task.stages["orientation"].checks and task.stages["orientation"].nfe(0) == 0


# The reference view


def test_the_view_from_the_pictures_camera_becomes_the_picture(tmp_path: Path) -> None:
    """Without any score: the loss alone, which is in the updates of every stage."""
    task = trainer(tmp_path, replace(GROUPED, views=3, learning_rate=0.03), 160, ZERO_GRADIENT)
    scene = task.train()
    for grey in (0.3, 0.9):  # colours and opacity
        background = torch.full((1, 3), grey)
        view = scene.render(picture_camera(0.0, ELEVATION, 16), background).rgb
        assert (view - PICTURE.over(background)).abs().mean() < 0.06
        lower = scene.render(picture_camera(0.0, -10.0, 16), background).rgb
        assert task.reference.psnr(view, background) > task.reference.psnr(lower, background)


def test_weights_and_their_schedules() -> None:
    weights = ImageTo3dOptions(0.0, LinearSchedule(0.0, 10.0), 2.0)
    reference = ReferenceView(PictureTeacher(), None, CUT_OUT, 0.0, weights)
    assert reference.weights(0.5) == {"reference_rgb": 5.0, "reference_mask": 2.0}


def test_refinement_steps_keep_to_the_picture_too(tmp_path: Path) -> None:
    stage = SDEditRefinementOptions((0.5,), start=0.5, views=6, steps=4)
    task = trainer(tmp_path, with_stages(GROUPED, sdedit_refinement=stage), 2)
    task.train()
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert '"reference_rgb"' in lines and '"rgb_loss"' in lines


def test_a_resumed_run_keeps_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends as one without a break, also where the elevation would now be another."""
    stage: StageOptions = SDEditRefinementOptions((0.5,), start=0.6, views=6, steps=2)
    options = with_stages(GROUPED, sdedit_refinement=stage)
    expected = trainer(tmp_path / "whole", options, 6).train()
    interrupted = trainer(tmp_path / "interrupted", options, 6)
    update = ScoreDistillationStage.update

    def fail_at_step_3(self: ScoreDistillationStage, step: int, progress: float) -> object:
        if step == 3:
            raise RuntimeError("power cut")
        return update(self, step, progress)

    monkeypatch.setattr(ScoreDistillationStage, "update", fail_at_step_3)
    with pytest.raises(RuntimeError, match="power cut"):
        interrupted.train()
    monkeypatch.setattr(ScoreDistillationStage, "update", update)
    resumed = trainer(tmp_path / "interrupted", options, 6, elevation=50.0)
    scene = resumed.train()
    assert resumed.reference.elevation == ELEVATION
    for name, value in expected.state_dict().items():
        assert torch.equal(value, scene.state_dict()[name]), name


# With a caption


def with_caption(directory: Path, options: TextTo3dOptions, steps: int) -> TextTo3d:
    teacher = PictureTeacher()
    reference = ReferenceView(teacher, None, CUT_OUT, 0.0, ImageTo3dOptions(align_at=0.5), has_caption=True)
    run = Run(run_options(directory, steps), {}, "t")
    return TextTo3d(run, teacher, SMALL, SDS, replace(options, prompt="a thing"), reference=reference)


def alignment_at(*angles: float) -> Callable[..., Alignment]:
    return lambda *args: Alignment(*angles, Frame(0.1, 0.0, 0.5), 0.0)


def test_a_picture_with_a_caption_is_aligned_and_counts_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher reads the caption with view words and absolute azimuths, and no picture."""
    monkeypatch.setattr(reference_view, "align_picture", alignment_at(120.0, 30.0))
    task = with_caption(tmp_path, GROUPED, 4)
    steps, errors = [], task.reference.errors
    monkeypatch.setattr(task.reference, "errors", lambda *a: steps.append(task.run.step) or errors(*a))
    task.train()
    assert steps == [2, 3]
    for _, conditioning in task.teacher.calls:
        assert REFERENCE not in conditioning.extras and POSE in conditioning.extras
    assert any(prompt.startswith("a thing, ") and "view" in prompt for prompt in task.teacher.prompts)
    assert '"picture_azimuth": 120' in (tmp_path / "metrics.jsonl").read_text()
    reference = task.reference
    assert (reference.azimuth, reference.elevation) == (120.0, 30.0)
    torch.testing.assert_close(reference.camera.azimuth, torch.tensor([120.0]))
    torch.testing.assert_close(reference.picture.alpha, CUT_OUT.picture(16, Frame(0.1, 0.0, 0.5)).alpha)


def test_a_resumed_run_keeps_the_alignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_view, "align_picture", alignment_at(120.0, 30.0))
    with_caption(tmp_path, GROUPED, 4).train()
    monkeypatch.setattr(reference_view, "align_picture", alignment_at(0.0, 0.0))
    resumed = with_caption(tmp_path, GROUPED, 6)
    resumed.train()
    assert resumed.reference.active and resumed.reference.azimuth == 120.0


def test_orientation_is_checked_until_the_picture_is_aligned(tmp_path: Path) -> None:
    checks = OrientationOptions((OrientationCheck(0.25), OrientationCheck(0.75)), views=6)
    task = with_caption(tmp_path, with_stages(GROUPED, orientation=checks), 4)
    assert list(task.stages["orientation"].checks) == [1]


# Mistakes and the command line


def test_options_that_a_picture_excludes_raise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="camera_condition is false"):
        trainer(tmp_path, replace(GROUPED, camera_condition=False))
    with pytest.raises(UserError, match=r"background_replacement is 0.5, .* give 1"):
        trainer(tmp_path, replace(GROUPED, background_replacement=0.5))
    values = yaml.safe_load((ROOT / "configs" / "objective" / "sds_perp_neg.yaml").read_text())
    with pytest.raises(UserError, match="without perp_neg"):
        trainer(tmp_path, objective=build(ObjectiveOptions, values, "objective"))
    for elevation in (-30.0, 95.0):
        with pytest.raises(UserError, match=rf"elevation is {elevation:g}: degrees within \[-10, 80\]"):
            ImageTo3dOptions(elevation)
    with pytest.raises(UserError, match=r"align_at is 1: a fraction in \[0, 1\)"):
        ImageTo3dOptions(align_at=1)
    with pytest.raises(UserError, match="mask_weight is -1"):
        ImageTo3dOptions(mask_weight=-1.0)
    with pytest.raises(UserError, match="OneImageTeacher takes no picture"):
        ReferenceView(OneImageTeacher(disc()), None, CUT_OUT, 0.0, ImageTo3dOptions())
    with pytest.raises(UserError, match=r"image=a.png and control.mesh=b.obj are given"):
        TextTo3dRecipe(
            prompt="",
            image="a.png",
            run=run_options(tmp_path, 1),
            text_to_3d=GROUPED,
            objective=SDS,
            control=MeshControlOptions("b.obj"),
        )


def test_a_prompt_is_optional_with_a_picture() -> None:
    teacher = PictureTeacher()
    check_inputs(teacher, GROUPED, picture=True)
    with pytest.raises(UserError, match="the prompt is empty"):
        check_inputs(teacher, GROUPED)


def test_a_run_on_a_picture_is_planned(multi_view_teacher_folder: Path) -> None:
    """The picture's row is work of the U-Net: four rows for three views, with and without it."""
    arguments = ["image=x.png", f"teacher={multi_view_teacher_folder}", "run.device=cpu", "run.steps=4"]
    arguments += ["text_to_3d.stages.sdedit_refinement=null"]
    plan = make_plan(text_to_3d_subject(load_script("text_to_3d", arguments)), torch.float32)
    assert plan.record.samples["U-Net"] == 4 * 2 * 4


def test_the_script_makes_a_mesh_of_a_picture(
    multi_view_teacher_folder: Path, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    """With its own defaults; mistakes leave no directory."""
    image = np.full((64, 80, 3), 200, np.uint8)
    image[10:50, 20:60] = 200, 30, 20
    Image.fromarray(image).save(tmp_path / "a photo.png")
    small = ["run.steps=3", "run.trackers=[]", "export.frames=2", "export.resolution=32"]
    small += ["export.mesh.resolution=24", "text_to_3d.stages.sdedit_refinement.views=3"]
    arguments = [f"image={tmp_path / 'a photo.png'}", f"run.directory={tmp_path / 'run'}", *small]
    arguments += [f"teacher={multi_view_teacher_folder}", "run.preview_every=2"]
    assert "degrees, estimated (image_to_3d.elevation)" in script("text_to_3d", *arguments)
    for name in ("mesh.glb", "turntable.mp4", "picture.png", "previews/picture_00000002.png"):
        assert (tmp_path / "run" / name).is_file(), name
    result = (tmp_path / "run" / "result.json").read_text()
    assert '"elevation_estimated": true' in result and '"reference_psnr"' in result
    assert '"views_per_group": 3' in result and '"clip_score"' not in result

    values = json.loads((tmp_path / "run" / "config.json").read_text())
    recipe = build(TextTo3dRecipe, {**values, "run": {**values["run"], "directory": str(tmp_path / "other")}})
    with pytest.raises(UserError, match="tiny takes no picture"):
        start_text_to_3d(replace(recipe, teacher=str(tiny_teacher_folder)))
    with pytest.raises(UserError, match=r"image missing.png cannot be read"):
        start_text_to_3d(replace(recipe, image="missing.png"))
    assert not (tmp_path / "other").exists()
