"""The second stage: rounds and their cost, views drawn over towards what the teacher knows, a scene fitted to them, resumed midway."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from test_text_to_3d import OPTIONS, SMALL, OneImage, disc, options
from torch import Tensor

from distill.core.score import Prediction
from distill.objectives.options import ObjectiveOptions, Term
from distill.runtime.errors import UserError
from distill.runtime.run import Run
from sds3d.scene.cameras import orbit, ring
from sds3d.text_to_3d.stages.orientation import OrientationCheck, OrientationOptions
from sds3d.text_to_3d.stages.sdedit_refinement import RefinedViews, SDEditRefinementOptions
from sds3d.text_to_3d.trainer import TextTo3d

STILL = ObjectiveOptions((Term("noise", 0.0),))  # an objective that moves nothing
REDRAW = SDEditRefinementOptions((1.0, 0.5), begin=0.5, views=6, steps=10, guidance=1.0)


class Painter(OneImage):
    """The teacher of one image, with the sampler of its schedule; it counts what it is asked."""

    def __init__(self) -> None:
        super().__init__(disc())
        alphas = self.schedule.alpha(torch.arange(1000)).double().square().flatten()
        betas = 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])
        self.scheduler = DDIMScheduler(
            trained_betas=betas.tolist(), clip_sample=False, prediction_type="epsilon"
        )
        self.nfe = 0

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        self.nfe += len(x_t)
        return super().predict(x_t, t, condition)


def made(
    directory: Path, steps: int, redraw: SDEditRefinementOptions = REDRAW, objective: ObjectiveOptions = STILL
) -> TextTo3d:
    return TextTo3d(
        Run(options(directory, steps), {}, "t"), Painter(), SMALL, objective, replace(OPTIONS, redraw=redraw)
    )  # type: ignore[arg-type]


def test_rounds_share_what_is_left_of_a_run() -> None:
    assert SDEditRefinementOptions((0.6, 0.5, 0.4), begin=0.7).rounds(600) == {420: 0.6, 480: 0.5, 540: 0.4}
    assert SDEditRefinementOptions().rounds(600) == {} and SDEditRefinementOptions().cost(600) == 0
    assert SDEditRefinementOptions((0.6, 0.25), views=3, steps=20).cost(600) == 3 * 2 * (12 + 5)
    assert SDEditRefinementOptions((0.6, 0.5, 0.4), begin=0.5).rounds(2) == {1: 0.4}  # too short for more
    assert SDEditRefinementOptions((0.6, 0.5), begin=0.8).rounds(2) == {}
    for wrong in (
        {"strengths": (1.5,)},
        {"strengths": (0.01,)},
        {"strengths": (0.5,), "steps": 0},
        {"begin": 1.0},
        {"views": 0},
        {"weight": 0.0},
    ):
        with pytest.raises(UserError, match="redraw"):
            SDEditRefinementOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"camera elevation is \[50, 10\]"):
        replace(OPTIONS, redraw=SDEditRefinementOptions(elevation=(50, 10)))
    with pytest.raises(UserError, match="must not turn"):
        replace(OPTIONS, redraw=REDRAW, facing=OrientationOptions((OrientationCheck(0.6),)))


def test_views_are_drawn_towards_what_the_teacher_knows(tmp_path: Path) -> None:
    """At full strength the picture is the teacher's; at less it keeps something of the scene; each view has its own words."""
    task = made(tmp_path, 10)
    off = {}
    for strength in (1.0, 0.1):
        task.redraw(strength)
        off[strength] = float((task.redrawn.images - disc()).abs().mean())
    assert off[1.0] < 0.04 < off[0.1]
    assert any("back view" in prompt for prompt in task.teacher.asked) and "" in task.teacher.asked  # type: ignore[attr-defined]
    assert (tmp_path / "previews").is_dir()


def test_the_scene_is_fitted_and_the_work_is_as_stated(tmp_path: Path) -> None:
    task = made(tmp_path, 120, objective=ObjectiveOptions((Term("teacher"), Term("noise", -1.0))))
    assert task.distilled == 60
    scene = task.train()
    front = scene.render(
        orbit(*(torch.tensor([v]) for v in (0.0, 0.0, 3.0, 35.0)), 16), torch.full((1, 3), 0.5)
    ).rgb
    assert (front - disc()).abs().mean() < 0.05
    assert task.teacher.nfe == task.nfe == 2 * 60 + 6 * (10 + 5)  # type: ignore[attr-defined]


def test_what_is_asked_of_a_facing_is_asked_in_the_run_and_stated(tmp_path: Path) -> None:
    task = made(tmp_path, 20)
    task.options = replace(
        task.options,
        facing=OrientationOptions((OrientationCheck(0.1), OrientationCheck(0.3, draws=3)), views=4),
    )
    assert task.turning_points == {2: OrientationCheck(0.1), 6: OrientationCheck(0.3, draws=3)}
    task.train()
    assert task.teacher.nfe == task.nfe == 4 * 5 * 3 * (2 + 3) + 6 * (10 + 5)  # type: ignore[attr-defined]


def test_only_the_second_stage_moves_a_scene_that_is_left_alone(tmp_path: Path) -> None:
    task = made(tmp_path, 40)
    before = task.scene.field.mlp[0].weight.detach().clone()
    task.step(0.1, 0)
    assert torch.equal(task.scene.field.mlp[0].weight, before)
    task.redraw(1.0)
    for step in range(30):
        last = task.fit(step)
    assert not torch.equal(task.scene.field.mlp[0].weight, before)
    assert (last.rgb - disc()).abs().mean() < 0.08


def test_a_run_broken_in_the_second_stage_resumes_to_the_same_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(tmp_path / "whole", 12).train()
    fit = TextTo3d.fit

    def breaks(self: TextTo3d, step: int) -> object:
        if step == 10:
            raise RuntimeError("power cut")
        return fit(self, step)

    monkeypatch.setattr(TextTo3d, "fit", breaks)
    with pytest.raises(RuntimeError, match="power cut"):
        made(tmp_path / "broken", 12).train()
    monkeypatch.setattr(TextTo3d, "fit", fit)
    again = made(tmp_path / "broken", 12).train()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_views_are_kept_with_their_cameras() -> None:
    kept, cameras = RefinedViews(5, 8), ring(5, 20.0, 8)
    images = torch.rand(5, 3, 8, 8)
    kept.take(cameras, torch.rand(5, 3), images)
    chosen, behind, some = kept.some(3, torch.Generator().manual_seed(0))
    for place in range(3):
        at = int((images == some[place]).all(-1).all(-1).all(-1).nonzero())
        assert chosen.azimuth[place] == cameras.azimuth[at] and torch.equal(
            chosen.rays()[0][place], cameras.rays()[0][at]
        )
        assert torch.equal(behind[place], kept.behind[at])
    again = RefinedViews(5, 8)
    again.load_state_dict(kept.state_dict())
    assert torch.equal(again.images, images)
