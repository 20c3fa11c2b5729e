"""Ray-cast renders against closed forms of a sphere, and the fronts of objects."""

import numpy as np
import pytest
import torch
import trimesh

from sds3d.scene.cameras import Cameras, orbit
from sds3d.world.raycast import AMBIENT, LIGHTS, RayCaster, Render, render, shade
from sds3d.world.shapes import COLOURS, OBJECTS, make_shape

RADIUS, DISTANCE, FOVY = 0.8, 3.0, 35.0
GREY = np.array([0.6, 0.6, 0.6])


def _camera(azimuth: float, elevation: float = 0.0, resolution: int = 64) -> Cameras:
    values = (torch.tensor([float(v)]) for v in (azimuth, elevation, DISTANCE, FOVY))
    return orbit(*values, resolution)


@pytest.fixture(scope="module")
def ball() -> RayCaster:
    return RayCaster(trimesh.creation.icosphere(5, RADIUS))


def _ball(ball: RayCaster, camera: Cameras, supersample: int = 1, light_rotation: float = 0.0) -> Render:
    return render(ball, np.tile(GREY, (len(ball.faces), 1)), camera, supersample, light_rotation)


def test_a_sphere_covers_the_perspective_area(ball: RayCaster) -> None:
    """Its angular radius is asin(r / d), so its disc has the radius tan(asin(r / d)) at distance 1."""
    view = _ball(ball, _camera(30, 20), supersample=4)
    disc = np.pi * np.tan(np.arcsin(RADIUS / DISTANCE)) ** 2
    window = (2 * np.tan(np.deg2rad(FOVY) / 2)) ** 2
    assert view.rgba[..., 3].mean() == pytest.approx(disc / window, rel=3e-3)


def test_depth_is_the_distance_along_the_ray(ball: RayCaster) -> None:
    camera = _camera(30, 20, 65)
    view = _ball(ball, camera)
    assert view.depth[32, 32] == pytest.approx(DISTANCE - RADIUS, abs=1e-3)
    origins, directions = (rays[0].numpy() for rays in camera.rays())
    hit = view.rgba[..., 3] > 0
    points = origins + directions * view.depth[..., None]
    np.testing.assert_allclose(np.linalg.norm(points, axis=-1)[hit], RADIUS, atol=2e-3)
    assert (view.depth[~hit] == 0).all() and (view.normal[~hit] == 0).all() and (~hit).any()


def test_normals_are_radial(ball: RayCaster) -> None:
    camera = _camera(-70, 40)
    view = _ball(ball, camera)
    origins, directions = (rays[0].numpy() for rays in camera.rays())
    hit = view.rgba[..., 3] > 0
    outward = (origins + directions * view.depth[..., None])[hit] / RADIUS
    np.testing.assert_allclose((view.normal[hit] * outward).sum(-1), 1, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(view.normal[hit], axis=-1), 1, atol=1e-5)


def test_alpha_is_antialiased_and_not_premultiplied(ball: RayCaster) -> None:
    view = _ball(ball, _camera(0), supersample=2)
    alpha = view.rgba[..., 3]
    assert set(np.unique(alpha)) == {0, 0.25, 0.5, 0.75, 1}
    assert alpha[32, 32] == 1 and alpha[0, 0] == 0
    edge = (alpha > 0) & (alpha < 1)
    assert (view.rgba[edge][:, 0] >= GREY[0] * AMBIENT - 1e-6).all(), (
        "colours are not darkened by the background"
    )
    assert set(np.unique(_ball(ball, _camera(0)).rgba[..., 3])) == {0, 1}


@pytest.mark.parametrize("azimuth", [0, 130])
def test_the_shade_depends_on_the_world_normal_alone(ball: RayCaster, azimuth: float) -> None:
    view = _ball(ball, _camera(azimuth, 10))
    hit = view.rgba[..., 3] > 0
    expected = np.full(int(hit.sum()), AMBIENT)
    for direction, strength in LIGHTS:
        unit = np.array(direction) / np.linalg.norm(direction)
        expected += strength * np.maximum(view.normal[hit] @ unit, 0)
    np.testing.assert_allclose(view.rgba[hit][:, :3], np.minimum(GREY * expected[:, None], 1), atol=1e-4)


def test_lights_rotate_about_z(ball: RayCaster) -> None:
    """A sphere's image is the same if lights rotate with the camera, and differs otherwise."""
    first = _ball(ball, _camera(0, 15)).rgba
    rotated = _ball(ball, _camera(100, 15), light_rotation=np.deg2rad(100)).rgba
    inner = (first[..., 3] > 0) & (rotated[..., 3] > 0)
    assert np.abs(first - rotated)[inner].max() < 0.01
    assert np.abs(first - _ball(ball, _camera(100, 15)).rgba)[inner].max() > 0.1


def test_shade_is_clipped_and_ambient_from_below() -> None:
    down, key = np.array([[0.0, 0.0, -1.0]], np.float32), np.array([LIGHTS[0][0]], np.float32)
    np.testing.assert_allclose(shade(np.array([GREY]), down), [GREY * AMBIENT], rtol=1e-6)
    assert shade(np.ones((1, 3)), key / np.linalg.norm(key)).max() <= 1


def test_smooth_normals_are_interpolated(ball: RayCaster) -> None:
    """Normals vary within a face of a sphere, but not on a side of a box with creases."""
    corner = RayCaster(make_shape("cube").mesh)
    face, _, normal = corner.cast(*_camera(0).rays())
    assert {tuple(n) for n in np.round(normal[face >= 0], 4) + 0.0} == {(1.0, 0.0, 0.0)}
    face, _, normal = ball.cast(*_camera(0, resolution=256).rays())
    middle = face == np.bincount(face[face >= 0]).argmax()
    assert middle.sum() > 2 and len(np.unique(normal[middle], axis=0)) > 2


def test_normals_of_back_faces_point_to_the_camera() -> None:
    caster = RayCaster(trimesh.creation.icosphere(3, 5.0))
    origins, directions = _camera(0, resolution=8).rays()
    face, _, normal = caster.cast(origins, directions)
    assert (face >= 0).all() and ((normal * directions.reshape(-1, 3).numpy()).sum(1) < 0).all()


@pytest.mark.parametrize("name", OBJECTS)
def test_faces_point_outwards(name: str) -> None:
    """First hits from outside are on the outer side of a face."""
    mesh = make_shape(name).mesh
    caster = RayCaster(mesh)
    for azimuth, elevation in ((0, 10), (90, -60), (180, 60), (270, 30)):
        origins, directions = _camera(azimuth, elevation, 32).rays()
        face = caster.cast(origins, directions)[0]
        hit = face >= 0
        cosine = (mesh.face_normals[face[hit]] * directions.reshape(-1, 3).numpy()[hit]).sum(1)
        assert hit.sum() > 20 and (cosine < 1e-3).all()


@pytest.mark.parametrize("name", OBJECTS)
def test_fronts_differ_from_backs_where_there_is_a_front(name: str) -> None:
    """Lights rotate with the camera: only the object differs between azimuth 0 and 180."""
    shape = make_shape(name)
    caster, albedo = RayCaster(shape.mesh), shape.albedo(np.array(COLOURS["red"]))  # no accent is red
    front = render(caster, albedo, _camera(0, 15, 48), 2).rgba
    back = render(caster, albedo, _camera(180, 15, 48), 2, np.pi).rgba
    difference = np.abs(front[..., :3] * front[..., 3:] - back[..., :3] * back[..., 3:]).mean()
    # The window of a rocket is too small for a front.
    assert difference > 5e-3 if shape.has_front else difference < 4e-3


def test_car_has_its_lights_in_front() -> None:
    shape = make_shape("car")
    caster = RayCaster(shape.mesh)
    white = (shape.accents > 0.9).all(1)
    faces = [caster.cast(*_camera(azimuth, 5).rays())[0] for azimuth in (0, 180)]
    front, back = (int(white[face[face >= 0]].sum()) for face in faces)
    assert front > 10 and back == 0
