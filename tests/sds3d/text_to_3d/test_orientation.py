"""Orientation: exact quarter turns, denoising errors in closed form, correction of rotated scenes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scene_fixtures import DISTILLATION, SDS, OneImageTeacher
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from sds3d.scene.cameras import orbit, ring
from sds3d.scene.nerf import NeRF, NerfOptions
from sds3d.scene.protocol import load_scene
from sds3d.text_to_3d.prompts import view_of
from sds3d.text_to_3d.stages.orientation import (
    AZIMUTH_VIEWS,
    NOISE_LEVELS,
    OrientationCheck,
    OrientationOptions,
    by_turn,
    denoising_errors,
    quarter_turns,
)
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions


@pytest.fixture
def scene() -> NeRF:
    """A scene without rotational symmetry."""
    torch.manual_seed(0)
    nerf = NeRF(NerfOptions())
    with torch.no_grad():
        for parameter in nerf.field.parameters():
            parameter += 0.5 * torch.randn(parameter.shape)
    nerf.update(0)
    return nerf


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotated_scene_looks_the_same_from_the_rotated_camera(turns: int, scene: NeRF) -> None:
    def render(azimuth: float) -> Tensor:
        camera = orbit(*(torch.tensor([value]) for value in (azimuth, 25.0, 3.0, 35.0)), 32)
        return scene.render(camera, torch.full((1, 3), 0.7)).rgb

    before, elsewhere = render(20.0), render(20.0 + 90 * turns)
    scene.rotate(turns)
    after = render(20.0 + 90 * turns)
    assert (before - elsewhere).abs().mean() > 0.01  # the scene is not symmetric
    assert torch.allclose(before, after, atol=2e-3)
    density = scene.grid.density_ema.clone()
    scene.grid.density_ema.zero_()
    scene.update(0)  # from the rotated field
    assert torch.allclose(density, scene.grid.density_ema, rtol=1e-3, atol=1e-4)


def test_four_quarter_turns_are_the_identity_and_rotation_is_saved(scene: NeRF, tmp_path: Path) -> None:
    points = torch.rand(100, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    before = scene.field.density(points)
    scene.rotate(1)
    assert not torch.allclose(scene.field.density(points), before)
    scene.save(tmp_path)
    assert torch.equal(load_scene(tmp_path).field.density(points), scene.field.density(points))
    scene.rotate(3)
    assert torch.equal(scene.field.density(points), before)
    state = load_file(tmp_path / "scene.safetensors")
    del state["field.rotation"]  # absent from scenes of older versions
    save_file(state, tmp_path / "scene.safetensors", metadata={"format": "sds3d-scene-1"})
    assert torch.equal(load_scene(tmp_path).field.density(points), before)


def test_positions_stay_float32_under_autocast(scene: NeRF, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 has at most 256 positions from -1 to 1, too few for a grid of 100 cells a side."""
    points = torch.rand(100, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encode, inputs = scene.field.encoding.forward, []
    monkeypatch.setattr(scene.field.encoding, "forward", lambda x: inputs.append(x) or encode(x))
    with torch.autocast("cpu", torch.bfloat16):
        scene.field.density(points)
    assert torch.equal(inputs[0], (points + 1) / 2)


def test_errors_are_distances_to_a_point_mass(gaussian: Callable[[float], Any]) -> None:
    """Where prompt k is a point mass at m_k, eps - noise = alpha (z - m_k) / sigma at every level."""
    model = gaussian(0.0)
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    means = torch.tensor([-1.0, 0.0, 2.0])
    prompts = Conditioning(means[:, None, None])
    errors = denoising_errors(model, latents, prompts.split(1), 2, torch.Generator().manual_seed(1))
    t = torch.tensor([round(level * model.schedule.num_train_timesteps) for level in NOISE_LEVELS])
    weight = (model.schedule.alpha(t) / model.schedule.sigma(t)).square().mean()
    expected = weight * (latents[:, None] - means[None, :, None, None, None]).square().sum((2, 3, 4))
    assert torch.allclose(errors.mean(0), expected, rtol=1e-3)
    each = denoising_errors(
        model, latents, prompts.repeat_interleave(5).split(5), 2, torch.Generator().manual_seed(1)
    )
    assert torch.equal(each, errors)
    model.queries = model.queries[: len(errors)]
    nfe = 5 * len(NOISE_LEVELS) * len(AZIMUTH_VIEWS) * 2
    assert sum(len(conditioning) for conditioning in model.queries) == nfe


def errors_of(turns: int, strength: float = 0.1) -> Tensor:
    """Errors (1, 16, 3) of an object rotated by quarter turns: the view word of its own frame fits best."""
    azimuths = ring(16).azimuth.tolist()
    views = [AZIMUTH_VIEWS.index(view_of(azimuth - 90.0 * turns, 0.0)) for azimuth in azimuths]
    indices = torch.arange(16), torch.tensor(views)
    return torch.ones(16, 3).index_put_(indices, torch.tensor(1 - strength))[None]


@pytest.mark.parametrize("turns", range(4))
def test_rotation_is_undone(turns: int) -> None:
    assert (quarter_turns(by_turn(errors_of(turns), ring(16)), 0.005) + turns) % 4 == 0
    assert quarter_turns(by_turn(errors_of(turns, 0.002), ring(16)), 0.005) == 0  # below the margin


class ViewTeacher(OneImageTeacher):
    """A teacher in pixel space with one image per view word, which its conditionings index."""

    def __init__(self, images: Sequence[Tensor]) -> None:
        super().__init__(torch.stack(list(images)), std=0.0)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        views = [AZIMUTH_VIEWS.index(prompt.split(", ")[1].split()[0]) for prompt in prompts]
        return Conditioning(torch.tensor(views)[:, None, None])

    def mean(self, conditioning: Conditioning) -> Tensor:
        return self.image[conditioning.embedding.flatten()]


def test_scene_rotated_by_180_degrees_is_corrected(scene: NeRF, tmp_path: Path) -> None:
    """The teacher's front is the scene's back, and its back the scene's front."""
    orientation = OrientationOptions((OrientationCheck(0.25), OrientationCheck(0.5, draws=3)))
    stages = {"score_distillation": DISTILLATION, "orientation": orientation}
    options = TextTo3dOptions("a red ball", background=(0.7, 0.7), stages=stages)
    cameras, grey = ring(4, orientation.elevation, ViewTeacher.resolution), torch.full((4, 3), 0.7)
    front, right_side, back, left_side = scene.render(cameras, grey).rgb
    teacher = ViewTeacher([back, (right_side + left_side) / 2, front])
    run = Run(RunOptions(str(tmp_path / "run"), steps=4, trackers=()), {}, "orientation")

    task = TextTo3d(run, teacher, NerfOptions(), SDS, options)
    task.scene.load_state_dict(scene.state_dict())
    stage = task.stages["orientation"]
    assert stage.align_orientation(OrientationCheck(0.5, margin=1.0), 0) == 0.0  # below the margin
    assert stage.align_orientation(OrientationCheck(0.5), 0) == 180.0
    assert torch.allclose(task.scene.render(cameras, grey).rgb[0], back, atol=2e-3)
    assert stage.align_orientation(OrientationCheck(0.5), 0) == 0.0

    sds_nfe = options.views * SDS.total_cost(4)
    assert task.nfe == 16 * 5 * 3 * (2 + 3) + sds_nfe
    unchecked = TextTo3d(run, teacher, NerfOptions(), SDS, replace(options, view_words=False))
    assert not unchecked.stages["orientation"].checks and unchecked.nfe == sds_nfe


def test_fractions_and_views_out_of_range_raise() -> None:
    with pytest.raises(UserError, match=r"check at 1.5"):
        OrientationCheck(1.5)
    with pytest.raises(UserError, match=r"orientation views is 3"):
        OrientationOptions(views=3)
