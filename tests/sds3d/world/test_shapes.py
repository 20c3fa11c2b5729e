"""Properties of every object of the world, and the layout of pairs."""

import itertools

import numpy as np
import pytest
import trimesh

from distill.runtime.errors import UserError
from sds3d.world.shapes import (
    COLOURS,
    COMPOSED,
    OBJECTS,
    RADIUS,
    REAL,
    RELATIONS,
    Shape,
    make_pair,
    make_shape,
)

RED, BLUE = np.array(COLOURS["red"]), np.array(COLOURS["blue"])
PAIRS = [("cube", "sphere"), ("mug", "cone"), ("torus", "capsule"), ("pyramid", "cylinder")]


def _solid(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """The mesh with the vertices merged that smooth shading duplicates at creases."""
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=True, merge_norm=True)


def _two(pair: Shape, first: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (2, 3) of either half of a pair."""
    count = len(first.mesh.vertices)
    halves = pair.mesh.vertices[:count], pair.mesh.vertices[count:]
    one, two = (np.stack([half.min(0), half.max(0)]) for half in halves)
    return one, two


def test_the_world_is_large_enough() -> None:
    assert len(set(OBJECTS)) == len(OBJECTS) >= 20
    assert len(COLOURS) >= 8
    assert len(REAL) >= 5 and not set(REAL) & set(COMPOSED)


def test_colours_are_distinct() -> None:
    values = np.array(list(COLOURS.values()))
    assert values.min() >= 0 and values.max() <= 1
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(values, 2)) > 0.2


@pytest.mark.parametrize("name", OBJECTS)
def test_object_is_finite_centred_and_within_the_ball(name: str) -> None:
    mesh = make_shape(name).mesh
    assert len(mesh.faces) > 0 and mesh.faces.min() >= 0 and mesh.faces.max() < len(mesh.vertices)
    assert np.isfinite(mesh.vertices).all() and np.isfinite(mesh.vertex_normals).all()
    assert np.linalg.norm(mesh.vertices, axis=1).max() == pytest.approx(RADIUS)
    np.testing.assert_allclose(mesh.bounds.mean(axis=0), 0, atol=1e-9)
    assert mesh.extents.min() > 0.1, "a solid, not a sheet"


@pytest.mark.parametrize("name", OBJECTS)
def test_accents_leave_faces_for_the_colour_of_the_caption(name: str) -> None:
    shape = make_shape(name)
    assert shape.accents.shape == (len(shape.mesh.faces), 3)
    unset = np.isnan(shape.accents)
    assert (unset.all(1) | ~unset.any(1)).all()
    fixed = shape.accents[~unset.any(1)]
    assert ((fixed >= 0) & (fixed <= 1)).all()
    area = shape.mesh.area_faces
    assert area[unset[:, 0]].sum() > 0.15 * area.sum(), "visible in the colour of the caption"
    before = shape.accents.copy()
    albedo = shape.albedo(RED)
    assert not np.isnan(albedo).any()
    assert (albedo[unset[:, 0]] == RED).all() and (albedo[~unset[:, 0]] == fixed).all()
    np.testing.assert_array_equal(shape.accents, before)


@pytest.mark.parametrize("name", REAL)
def test_real_meshes_are_watertight(name: str) -> None:
    solid = _solid(make_shape(name).mesh)
    assert solid.is_watertight and solid.is_winding_consistent
    assert 0.01 < solid.volume < 4 / 3 * np.pi * RADIUS**3
    assert (make_shape(name).has_front, len(solid.split())) == (True, 1)


def test_shape_has_a_front_flag_and_a_name() -> None:
    assert make_shape("car").has_front and not make_shape("sphere").has_front
    assert make_shape("sphere").name == "sphere"


def test_known_volumes() -> None:
    """A cube in the ball of 0.8 has edges of 1.6 / sqrt(3); a tessellated sphere nearly the ball's volume."""
    assert _solid(make_shape("cube").mesh).volume == pytest.approx((1.6 / 3**0.5) ** 3)
    assert _solid(make_shape("sphere").mesh).volume == pytest.approx(4 / 3 * np.pi * 0.8**3, rel=0.02)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pair_is_scaled_and_coloured(first: str, second: str, relation: str) -> None:
    one, two = make_shape(first), make_shape(second)
    bounds = one.mesh.bounds.copy(), two.mesh.bounds.copy()
    pair = make_pair(one, relation, two, (RED, BLUE))
    assert np.linalg.norm(pair.mesh.vertices, axis=1).max() == pytest.approx(RADIUS)
    np.testing.assert_allclose(pair.mesh.bounds.mean(axis=0), 0, atol=1e-9)
    assert len(pair.mesh.faces) == len(one.mesh.faces) + len(two.mesh.faces)
    assert (pair.accents[: len(one.mesh.faces)] == RED).all() and (
        pair.accents[len(one.mesh.faces) :] == BLUE
    ).all()
    np.testing.assert_array_equal(one.mesh.bounds, bounds[0])  # cached shapes are not modified
    np.testing.assert_array_equal(two.mesh.bounds, bounds[1])


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_on_top_of_touches_and_is_above(first: str, second: str) -> None:
    one = make_shape(first)
    top, base = _two(make_pair(one, "on top of", make_shape(second), (RED, BLUE)), one)
    assert top[0, 2] == pytest.approx(base[1, 2])
    np.testing.assert_allclose(top.mean(0)[:2], base.mean(0)[:2], atol=1e-9)


@pytest.mark.parametrize(("relation", "axis"), [("next to", 1), ("in front of", 0)])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_side_by_side_pairs_have_a_gap_and_one_ground(
    first: str, second: str, relation: str, axis: int
) -> None:
    one = make_shape(first)
    near, far = _two(make_pair(one, relation, make_shape(second), (RED, BLUE)), one)
    assert 0 < near[0, axis] - far[1, axis] < 0.15
    assert near[0, 2] == pytest.approx(far[0, 2])


def test_unknown_names_raise() -> None:
    with pytest.raises(UserError, match="dragon"):
        make_shape("dragon")
    with pytest.raises(UserError, match="under"):
        make_pair(make_shape("cube"), "under", make_shape("cone"), (RED, BLUE))
