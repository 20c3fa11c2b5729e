"""Facing: quarter turns are exact, the denoising error tells the truest word, and a scene that grew turned round is turned back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.core.noise import NoiseSchedule
from distill.core.score import Prediction, ScoreModel
from distill.objectives.options import ObjectiveOptions, Term
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from sds3d.scene.cameras import orbit, ring
from sds3d.scene.nerf import Scene, SceneOptions
from sds3d.text_to_3d.prompts import view_of
from sds3d.text_to_3d.stages.orientation import (
    AZIMUTH_VIEWS,
    LEVELS,
    OrientationCheck,
    OrientationOptions,
    quarter_turns,
    view_errors,
)
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions


@pytest.fixture
def scene() -> Scene:
    """A scene with something lopsided in it."""
    torch.manual_seed(0)
    made = Scene(SceneOptions())
    with torch.no_grad():
        for parameter in made.field.parameters():
            parameter += 0.5 * torch.randn(parameter.shape)
    made.update(0)
    return made


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_turned_scene_is_seen_from_as_much_further_round(quarters: int, scene: Scene) -> None:
    def seen(azimuth: float) -> Tensor:
        camera = orbit(*(torch.tensor([value]) for value in (azimuth, 25.0, 3.0, 35.0)), 32)
        return scene.render(camera, torch.full((1, 3), 0.7)).rgb

    before, elsewhere = seen(20.0), seen(20.0 + 90 * quarters)
    scene.turn_by(quarters)
    after = seen(20.0 + 90 * quarters)
    assert (before - elsewhere).abs().mean() > 0.01  # it is lopsided
    assert torch.allclose(before, after, atol=2e-3)
    levels = scene.grid.levels.clone()
    scene.grid.levels.zero_()
    scene.update(0)  # what the turned field itself fills
    assert torch.allclose(levels, scene.grid.levels, rtol=1e-3, atol=1e-4)


def test_four_quarters_are_none_and_a_turn_is_saved(scene: Scene, tmp_path: Path) -> None:
    points = torch.rand(100, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    before = scene.field.density(points)
    scene.turn_by(1)
    assert not torch.allclose(scene.field.density(points), before)
    scene.save(tmp_path)
    assert torch.equal(Scene.load(tmp_path).field.density(points), scene.field.density(points))
    scene.turn_by(3)
    assert torch.equal(scene.field.density(points), before)
    state = load_file(tmp_path / "scene.safetensors")
    del state["field.turn"]  # as scenes were written before
    save_file(state, tmp_path / "scene.safetensors", metadata={"format": "sds3d-scene-1"})
    assert torch.equal(Scene.load(tmp_path).field.density(points), before)


def test_positions_stay_fine_under_autocast(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 tells 256 places from -1 to 1 apart at best, too few for a grid of 100 cells a side."""
    points = torch.rand(100, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encode, seen = scene.field.encoding.forward, []
    monkeypatch.setattr(scene.field.encoding, "forward", lambda x: seen.append(x) or encode(x))
    with torch.autocast("cpu", torch.bfloat16):
        scene.field.density(points)
    assert torch.equal(seen[0], (points + 1) / 2)


def test_errors_are_a_point_mass_distance(gaussian: Callable[[float], Any]) -> None:
    """A teacher whose prompt k is a point at m_k: eps - noise = alpha (z - m_k) / sigma at every level."""
    model = gaussian(0.0)
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    means = torch.tensor([-1.0, 0.0, 2.0])
    told = view_errors(model, latents, means[:, None, None], 2, torch.Generator().manual_seed(1))
    t = torch.tensor([round(level * model.schedule.num_train_timesteps) for level in LEVELS])
    weight = (model.schedule.alpha(t) / model.schedule.sigma(t)).square().mean()
    expected = weight * (latents[:, None] - means[None, :, None, None, None]).square().sum((2, 3, 4))
    assert torch.allclose(told, expected, rtol=1e-3)
    assert (
        sum(len(asked) for asked in model.asked)
        == 5 * OrientationOptions(views=5).cost(OrientationCheck(0.5, draws=2)) / 5
    )


def errors_of(turned: int, strength: float = 0.1) -> Tensor:
    """Errors (16, 3) of an object that was turned by so many quarters: the word it was made for fits best."""
    words = [
        AZIMUTH_VIEWS.index(view_of(azimuth - 90.0 * turned, 0.0)) for azimuth in ring(16).azimuth.tolist()
    ]
    return torch.ones(16, 3).index_put_((torch.arange(16), torch.tensor(words)), torch.tensor(1 - strength))


@pytest.mark.parametrize("turned", range(4))
def test_what_was_turned_is_turned_back(turned: int) -> None:
    assert (quarter_turns(errors_of(turned), ring(16), 0.005) + turned) % 4 == 0
    assert quarter_turns(errors_of(turned, 0.002), ring(16), 0.005) == 0  # too little to tell


class RenderedViews(ScoreModel):
    """A teacher in pixel space that knows one image a view word: its text states are the words' numbers."""

    resolution = 16

    def __init__(self, images: list[Tensor]) -> None:
        self.schedule, self.images = NoiseSchedule(torch.linspace(0.999, 0.01, 1000)), torch.stack(images)

    def encode_text(self, prompts: list[str]) -> Tensor:
        return torch.tensor([AZIMUTH_VIEWS.index(prompt.split(", ")[1].split()[0]) for prompt in prompts])[
            :, None, None
        ]

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    decode = encode_images

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return Prediction.of(
            (x_t - alpha * self.images[condition.flatten()]) / sigma, x_t, t, self.schedule, "epsilon"
        )


def test_a_scene_that_grew_turned_round_is_turned_back(scene: Scene, tmp_path: Path) -> None:
    """The teacher's front is what the scene shows behind, its back what it shows before."""
    options = TextTo3dOptions(
        "a red ball",
        background=(0.7, 0.7),
        facing=OrientationOptions((OrientationCheck(0.25), OrientationCheck(0.5, draws=3))),
    )
    around = ring(4, options.facing.elevation, RenderedViews.resolution)
    front, right, back, left = scene.render(around, torch.full((4, 3), 0.7)).rgb
    teacher = RenderedViews([back, (right + left) / 2, front])
    run = Run(RunOptions(str(tmp_path / "run"), steps=4, trackers=()), {}, "facing")
    sds = ObjectiveOptions((Term("teacher"), Term("noise", -1.0)))
    made = TextTo3d(run, teacher, SceneOptions(), sds, options)  # type: ignore[arg-type]
    made.scene.load_state_dict(scene.state_dict())
    assert made.face(OrientationCheck(0.5, margin=1.0), 0) == 0.0  # nothing is better by so much
    assert made.face(OrientationCheck(0.5), 0) == 180.0
    assert torch.allclose(made.scene.render(around, torch.full((4, 3), 0.7)).rgb[0], back, atol=2e-3)
    assert made.face(OrientationCheck(0.5), 0) == 0.0
    assert made.nfe == 16 * 5 * 3 * (2 + 3) + options.views * sds.total_cost(4)
    blind = TextTo3d(run, teacher, SceneOptions(), sds, replace(options, view_words=False))  # type: ignore[arg-type]
    assert not blind.turning_points and blind.nfe == options.views * sds.total_cost(4)


def test_shares_are_within_the_run() -> None:
    with pytest.raises(UserError, match=r"asked at 1.5"):
        OrientationCheck(1.5)
    with pytest.raises(UserError, match=r"facing.views is 3"):
        OrientationOptions(views=3)
