"""Cameras: positions, rays, orientation, and the distribution of random ones."""

import dataclasses

import pytest
import torch
from torch import Tensor

from distill.runtime.config import build
from distill.runtime.errors import UserError
from sds3d.scene.cameras import CameraOptions, Cameras, orbit, ring, sample_cameras

ANGLES = [(0.0, 0.0), (37.0, 20.0), (-120.0, -10.0), (179.0, 80.0), (400.0, 89.0)]


def _camera(azimuth: float, elevation: float, resolution: int = 33, target: Tensor | None = None) -> Cameras:
    values = (torch.tensor([v]) for v in (azimuth, elevation, 3.0, 35.0))
    return orbit(*values, resolution, target)


def _pixel(camera: Cameras, point: list[float]) -> tuple[int, int]:
    """Row and column of the pixel whose ray passes nearest to a point."""
    origins, directions = camera.rays()
    direction = torch.nn.functional.normalize(torch.tensor(point) - origins, dim=-1)
    best = int((direction * directions).sum(-1).flatten().argmax())
    return divmod(best, camera.resolution)


def _random(count: int, stratified: bool = True, seed: int = 0, **changes: object) -> Cameras:
    options = dataclasses.replace(CameraOptions(), **changes)
    return sample_cameras(options, count, 8, torch.Generator().manual_seed(seed), stratified)


@pytest.mark.parametrize(("azimuth", "elevation"), ANGLES)
def test_rays_are_unit_and_start_at_the_camera(azimuth: float, elevation: float) -> None:
    camera = _camera(azimuth, elevation, 9)
    origins, directions = camera.rays()
    assert origins.shape == directions.shape == (1, 9, 9, 3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(1, 9, 9))
    torch.testing.assert_close(origins, camera.position[:, None, None].expand(1, 9, 9, 3))


@pytest.mark.parametrize(("azimuth", "elevation"), ANGLES)
@pytest.mark.parametrize("target", [None, [[0.3, -0.2, 0.1]]])
def test_the_centre_ray_hits_the_target(azimuth: float, elevation: float, target: list | None) -> None:
    centre = torch.zeros(1, 3) if target is None else torch.tensor(target)
    camera = _camera(azimuth, elevation, target=None if target is None else centre)
    origins, directions = camera.rays()
    torch.testing.assert_close((origins + 3 * directions)[:, 16, 16], centre, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("azimuth", "elevation"), ANGLES)
def test_the_rotation_is_right_handed_and_level(azimuth: float, elevation: float) -> None:
    camera = _camera(azimuth, elevation)
    rotation = camera.rotation[0]
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.tensor(1.0))
    torch.testing.assert_close(rotation[:, 2] * 3, camera.position[0], atol=1e-5, rtol=0)
    assert abs(float(rotation[2, 0])) < 1e-6, "the horizon is level"
    assert float(rotation[2, 1]) > 0, "up is up"


def test_positions_follow_the_convention() -> None:
    positions = [
        _camera(azimuth, elevation).position[0]
        for azimuth, elevation in ((0.0, 0.0), (90.0, 0.0), (0.0, 30.0))
    ]
    expected = [[3, 0, 0], [0, 3, 0], [3 * 3**0.5 / 2, 0, 1.5]]
    torch.testing.assert_close(torch.stack(positions), torch.tensor(expected), atol=1e-5, rtol=0)


def test_plus_y_is_right_and_plus_z_is_up_from_the_front() -> None:
    assert _pixel(_camera(0, 0), [0, 0, 0]) == (16, 16)
    row, column = _pixel(_camera(0, 0), [0, 0.5, 0])
    assert row == 16 and column > 16
    row, column = _pixel(_camera(0, 0), [0, 0, 0.5])
    assert row < 16 and column == 16
    row, column = _pixel(_camera(90, 0), [0.5, 0, 0])  # from +y the front, +x, is on the left
    assert row == 16 and column < 16


def test_the_field_of_view_ends_at_the_border() -> None:
    _, directions = _camera(0, 0, 64).rays()
    slope = (
        directions[0, :, 0, 1] / -directions[0, :, 0, 0]
    )  # leftmost column: half a pixel within the border
    expected = torch.tan(torch.deg2rad(torch.tensor(17.5))) * (1 - 1 / 64)
    torch.testing.assert_close(slope, -expected.expand(64), atol=1e-5, rtol=0)


def test_with_resolution_changes_the_resolution_only() -> None:
    camera = _camera(30, 10)
    finer = camera.with_resolution(99)
    assert (camera.resolution, finer.resolution, len(finer)) == (33, 99, 1)
    torch.testing.assert_close(finer.rays()[1][:, 1::3, 1::3], camera.rays()[1], atol=1e-6, rtol=0)
    assert camera.to("cpu").position.equal(camera.position)


@pytest.mark.parametrize("count", [1, 4, 7])
@pytest.mark.parametrize("azimuth", [(-180.0, 180.0), (20.0, 50.0)])
def test_stratified_azimuths_cover_every_stratum(count: int, azimuth: tuple[float, float]) -> None:
    low, high = azimuth
    for seed in range(20):
        fraction = (_random(count, seed=seed, azimuth=azimuth).azimuth - low) / (high - low)
        assert sorted((fraction * count).floor().int().tolist()) == list(range(count))


def test_unstratified_azimuths_do_not() -> None:
    strata = [((_random(8, False, seed).azimuth + 180) / 45).floor().unique().numel() for seed in range(20)]
    assert min(strata) < 8


def test_random_cameras_cover_their_ranges() -> None:
    options = CameraOptions()
    cameras = _random(2000, fovy=(20.0, 40.0))
    targets = cameras.position - cameras.rotation[:, :, 2] * 3
    assert cameras.elevation.min() >= -10 and cameras.elevation.max() <= 80 and cameras.elevation.std() > 20
    distance = (cameras.position - _random(2000, fovy=(20.0, 40.0), centre_jitter=0.0).position).abs()
    assert 0.04 < distance.max() <= options.centre_jitter + 1e-5, "the jitter is an offset of each axis"
    fovy = torch.rad2deg(cameras.fovy)
    assert 20 <= fovy.min() < 21 and 39 < fovy.max() <= 40
    assert (targets.norm(dim=-1) < 0.25 + 0.05 * 3**0.5 + 1e-5).all(), "distance 3 plus or minus 0.25"


def test_random_cameras_are_a_function_of_the_seed() -> None:
    assert _random(5, seed=3).position.equal(_random(5, seed=3).position)
    assert not _random(5, seed=3).position.equal(_random(5, seed=4).position)


def test_ring_is_uniform_and_starts_at_the_front() -> None:
    cameras = ring(8, elevation=15.0, resolution=16)
    assert cameras.azimuth.tolist() == [0, 45, 90, 135, 180, 225, 270, 315]
    assert (len(cameras), cameras.resolution) == (8, 16)
    torch.testing.assert_close(cameras.position.norm(dim=-1), torch.full((8,), 3.0))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"elevation": (30.0, 10.0)}, "elevation"),
        ({"elevation": (0.0, 90.0)}, "elevation"),
        ({"azimuth": (-400.0, 0.0)}, "azimuth"),
        ({"distance": (0.0, 1.0)}, "distance"),
        ({"distance": (1.0, float("nan"))}, "distance"),
        ({"fovy": (35.0, 180.0)}, "fovy"),
        ({"centre_jitter": -0.1}, "centre_jitter"),
        ({"centre_jitter": float("nan")}, "centre_jitter"),
    ],
)
def test_options_out_of_range_raise(changes: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        CameraOptions(**changes)


def test_split_and_select_keep_the_order() -> None:
    cameras = ring(5, resolution=8)
    chunks = list(cameras.split(2))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert torch.cat([chunk.azimuth for chunk in chunks]).equal(cameras.azimuth)
    assert cameras.select(torch.tensor([3, 0])).azimuth.tolist() == [216, 0]


def test_camera_options_have_no_resolution() -> None:
    """It had no effect: cameras are sampled at the resolution that they are rendered at."""
    with pytest.raises(UserError, match="resolution is not an option"):
        build(CameraOptions, {"resolution": 32})
