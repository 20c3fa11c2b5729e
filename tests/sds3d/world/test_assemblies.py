"""Assemblies: deterministic, connected, watertight, within the ball; their colours and textures."""

from functools import lru_cache

import numpy as np
import pytest
import torch
import trimesh

from sds3d.scene.cameras import ring
from sds3d.world.assemblies import MAX_PARTS, MIN_PARTS, UNSEEN, assembly_parts, make_assembly
from sds3d.world.parts import Part, touch
from sds3d.world.primitives import ball, torus
from sds3d.world.raycast import RayCaster, render
from sds3d.world.shapes import RADIUS, Shape, make_shape
from sds3d.world.textures import Dots, Pattern, Stripes

SEEDS = (*range(20), *UNSEEN[:5])
PIXEL = 2 * 3 * np.tan(np.deg2rad(35) / 2) / 64  # of an image of 64 at the distance of the object
BLACK, RED, WHITE = np.zeros(3), np.array([1.0, 0.0, 0.0]), np.ones(3)


@lru_cache
def _assembly(seed: int) -> Shape:
    return make_assembly(seed)


def _closed(part: Part) -> trimesh.Trimesh:
    """A part's surface with the vertices merged that are duplicated at creases."""
    mesh = part.mesh()
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=True, merge_norm=True)


def _patterns(count: int) -> list[tuple[Shape, Pattern]]:
    return [(_assembly(seed), pattern) for seed in range(count) for pattern in _assembly(seed).patterns]


@pytest.mark.parametrize("seed", SEEDS)
def test_assembly_is_centred_in_the_ball_with_all_its_colours(seed: int) -> None:
    shape = _assembly(seed)
    assert np.linalg.norm(shape.mesh.vertices, axis=1).max() == pytest.approx(RADIUS)
    np.testing.assert_allclose(shape.mesh.bounds.mean(0), 0, atol=1e-9)
    assert shape.mesh.extents.min() > 0.1
    assert shape.accents.shape == (len(shape.mesh.faces), 3) and not shape.has_front
    assert ((shape.accents >= 0) & (shape.accents <= 1)).all(), "no face has the colour of a caption"
    length = np.linalg.norm(shape.mesh.vertex_normals, axis=1)
    np.testing.assert_allclose(length, 1, atol=1e-6)


def test_assemblies_are_functions_of_their_seed() -> None:
    first, again, other = make_assembly(3), make_assembly(3), make_assembly(4)
    np.testing.assert_array_equal(first.mesh.vertices, again.mesh.vertices)
    np.testing.assert_array_equal(first.accents, again.accents)
    assert first.mesh.vertices.shape != other.mesh.vertices.shape
    shapes = {make_assembly(seed).mesh.vertices.tobytes() for seed in range(60)}
    assert len(shapes) == 60
    assert len(set(UNSEEN)) == 30


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_are_watertight_and_connected(seed: int) -> None:
    """Every part after the first shares points with an earlier one, by the rays of trimesh's `contains`."""
    parts, _ = assembly_parts(seed)
    assert MIN_PARTS <= len(parts) <= MAX_PARTS
    solids = [_closed(part) for part in parts]
    for solid in solids:
        assert solid.is_watertight and solid.is_winding_consistent and solid.volume > 0
    points = [np.concatenate([s.vertices, s.sample(1500, seed=0)]) for s in solids]
    for i in range(1, len(solids)):
        assert any(
            solids[i].contains(points[j]).any() or solids[j].contains(points[i]).any() for j in range(i)
        ), f"part {i}"


def test_assemblies_are_diverse() -> None:
    counts = [len(assembly_parts(seed)[0]) for seed in range(100)]
    assert set(counts) == set(range(MIN_PARTS, MAX_PARTS + 1))
    colours = [len(np.unique(_assembly(seed).accents, axis=0)) for seed in range(100)]
    assert set(colours) == {1, 2, 3, 4}
    assert 0.15 < len(_patterns(100)) / sum(counts) < 0.35, "about a quarter of the parts has a texture"


def test_touch_is_that_of_balls() -> None:
    one = Part(ball(), np.eye(3), np.zeros(3))
    for distance, expected in ((0.5, True), (0.9, True), (1.01, False), (3.0, False)):
        other = Part(ball(), np.eye(3), np.array([0, 0, distance]))
        assert touch(one, other) == touch(other, one) == expected


def test_touch_knows_the_hole_of_a_ring() -> None:
    ring_part = Part(torus(0.2), np.diag([1, 1, 0.2]), np.zeros(3))
    for x, expected in ((0.0, False), (0.4, True)):
        knob = Part(ball(), 0.2 * np.eye(3), np.array([x, 0, 0]))
        assert touch(ring_part, knob) == touch(knob, ring_part) == expected


def test_stripes_at_known_points() -> None:
    stripes = Stripes(np.array([1.0, 0, 0]), np.array([1.0, 0, 0]), 0.2)
    points = np.array([[1.0, 5, 5], [1.09, 0, 0], [1.11, 0, 0], [1.29, 0, 0], [1.31, 0, 0], [0.89, 0, 0]])
    assert stripes.mask(points).tolist() == [False, False, True, True, False, True]


def test_dots_at_known_points() -> None:
    axes = np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    dots = Dots(np.zeros(3), axes, np.array([0.3, 0.4, 0.5]), 0.1)
    # The spacing along y is 0.3 and along x 0.4: a corner, a centre and points between of the lattice.
    points = np.array(
        [[0, 0, 0], [0, 0.3, 0], [0.4, 0, 0], [0.2, 0.15, 0.25], [0.2, 0, 0], [0.09, 0, 0], [0.11, 0, 0]]
    )
    assert dots.mask(points).tolist() == [True, True, True, True, False, True, False]


def test_patterns_cover_their_faces_alone() -> None:
    mesh = trimesh.creation.box((1, 1, 1))
    stripes = Stripes(np.zeros(3), np.array([0, 0, 1.0]), 0.25)
    shape = Shape("box", mesh, np.full((12, 3), np.nan), False, (Pattern(2, 4, stripes, RED),))
    points = np.array([[0, 0, 0.25], [0, 0, 0.25], [0, 0, 0.25], [0, 0, 0.0]])
    colours = shape.colours_at(points, np.array([1, 2, 4, 3]), WHITE)
    np.testing.assert_array_equal(colours, [WHITE, RED, WHITE, WHITE])


def test_untextured_objects_have_the_colours_of_their_faces() -> None:
    shape, faces = make_shape("car"), np.array([0, 5, 900])
    np.testing.assert_array_equal(shape.colours_at(np.zeros((3, 3)), faces, RED), shape.albedo(RED)[faces])


def test_stripes_are_five_pixels_wide_and_both_colours_show() -> None:
    for shape, pattern in _patterns(40):
        if isinstance(pattern.texture, Stripes):
            assert pattern.texture.width / PIXEL > 5
        part = trimesh.Trimesh(shape.mesh.vertices, shape.mesh.faces[pattern.first : pattern.last])
        points, faces = trimesh.sample.sample_surface(part, 2000, seed=0)
        colours = shape.colours_at(points, faces + pattern.first, BLACK)
        second = (colours == pattern.colour).all(1)
        assert 0.03 < second.mean() < 0.97
        np.testing.assert_array_equal(colours[~second], shape.accents[faces[~second] + pattern.first])


def test_textures_follow_the_part_into_the_mesh() -> None:
    """Evaluated in the axes of the layout, before centring and scaling, stripes are the same."""
    count = 0
    for seed in range(30):
        shape, (parts, _) = _assembly(seed), assembly_parts(seed)
        layout = np.concatenate([part.vertices() for part in parts])
        scale = (shape.mesh.extents / np.ptp(layout, axis=0)).mean()
        firsts = np.cumsum([0, *(len(part.primitive.faces) for part in parts)])
        for pattern in shape.patterns:
            part = parts[list(firsts).index(pattern.first)]
            offset = (layout.max(0) + layout.min(0)) / 2
            np.testing.assert_allclose(pattern.texture.origin, (part.centre - offset) * scale, atol=1e-9)
            count += 1
    assert count > 10


def test_renders_have_the_colours_of_the_texture() -> None:
    """Without supersampling, a pixel is the true colour at its hit times a grey of light."""
    shape = next(_assembly(seed) for seed in range(20) if len(_assembly(seed).patterns) > 1)
    caster, camera = RayCaster(shape.mesh), ring(1, 25.0)

    def albedo(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
        return shape.colours_at(points, faces, BLACK)

    image = render(caster, albedo, camera, supersample=1).rgba.reshape(-1, 4)
    origins, directions = camera.rays()
    face, distance, _ = caster.cast(origins, directions)
    hit = (face >= 0) & (image[:, :3].max(1) < 1)
    rays = torch.cat([origins, directions], -1).reshape(-1, 6).numpy()[hit]
    colours = albedo(rays[:, :3] + distance[hit, None] * rays[:, 3:], face[hit])
    np.testing.assert_allclose(np.cross(image[hit, :3], colours), 0, atol=1e-5)
    plain = render(caster, shape.albedo(BLACK), camera, supersample=1).rgba
    assert (np.abs(image.reshape(64, 64, 4) - plain).max(-1) > 0.05).sum() > 20
