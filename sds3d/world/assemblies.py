"""Procedural assemblies of primitives: unnamed objects that are connected and look manufactured."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from trimesh import transformations as tf

from sds3d.world import primitives
from sds3d.world.finishes import Finish, sample_finishes, texture_of
from sds3d.world.parts import MIRROR, Part, hidden, touch
from sds3d.world.primitives import Primitive
from sds3d.world.shapes import ColouredMesh, Shape, join_smooth
from sds3d.world.textures import Pattern

UNSEEN = tuple(range(1_000_000, 1_000_030))  # seeds for grading: no data set of the world has them
MIN_PARTS, MAX_PARTS = 2, 7
MAX_HIDDEN = 0.6  # fraction of a part's vertices that may lie in other parts
MIN_EXTENTS = (0.16, 0.32)  # smallest and second extent of an assembly, relative to the largest
MIN_PART = 0.2  # largest edge of a part, relative to that of the assembly
THIN = 0.09  # smallest edge of a part; the first has edges of about 1
ATTEMPTS = 80  # features proposed before an assembly is left as it is
X, Y, Z = np.eye(3)
Sized = tuple[Primitive, np.ndarray]  # a primitive and the edges (3,) of its box
KINDS = {
    **{"box": 0.2, "cylinder": 0.15, "ball": 0.12, "taper": 0.12, "prism": 0.1, "cone": 0.08},
    **{"capsule": 0.07, "dome": 0.06, "roof": 0.04, "wedge": 0.03, "tube": 0.03},
}


def _solid(rng: np.random.Generator) -> Sized:
    """A random solid with edges of at most 1."""
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    edges = rng.uniform(0.35, 1.0, 3)
    round_edges = edges[[0, 0, 2]]
    if kind in ("box", "roof", "wedge"):
        solid = {"box": primitives.frustum(4, 1.0), "roof": primitives.roof(), "wedge": primitives.wedge()}
        return solid[kind], edges
    if kind == "taper":
        sections = int(rng.choice([4, 4, 6, primitives.ROUND]))
        top = float(rng.choice([0.4, 0.6, 0.8]))
        return primitives.frustum(sections, top), edges if sections == 4 else round_edges
    if kind == "prism":
        return primitives.frustum(int(rng.choice([3, 5, 6, 8])), 1.0), round_edges
    if kind == "cone":
        return primitives.frustum(int(rng.choice([4, primitives.ROUND, primitives.ROUND])), 0.0), round_edges
    if kind == "ball":
        return primitives.ball(), edges if rng.random() < 0.5 else edges[[0, 0, 0]]
    if kind == "capsule":
        length = int(rng.integers(1, 4))
        return primitives.capsule(length), np.array([1, 1, 1 + length / 2]) / (1 + length / 2)
    if kind == "dome":
        return primitives.dome(), edges[[0, 0, 0]] * (1, 1, rng.uniform(0.4, 0.8))
    if kind == "tube":
        return primitives.tube(float(rng.choice([0.65, 0.78]))), round_edges * (1, 1, 0.7)
    return primitives.frustum(primitives.ROUND, 1.0), round_edges


def _rotation(rng: np.random.Generator) -> np.ndarray:
    """Mostly upright; else lying, turned by 45 degrees, or free."""
    lying = tf.rotation_matrix(np.pi / 2, X if rng.random() < 0.5 else Y)[:3, :3]
    turned = tf.rotation_matrix(np.pi / 4, (X, Y, Z)[rng.integers(3)])[:3, :3]
    tilted = tf.euler_matrix(*rng.uniform(-0.6, 0.6, 3))[:3, :3]
    choices = (np.eye(3), lying, turned, tilted)
    return choices[int(rng.choice(4, p=[0.66, 0.2, 0.08, 0.06]))]


def _attach(
    parent: Part, direction: np.ndarray, solid: Sized, rotation: np.ndarray, shift: np.ndarray
) -> Part:
    """A solid whose end against `direction` (3,) is in the parent's end along it, moved by `shift` (3,)."""
    primitive, edges = solid
    part = Part(primitive, rotation * np.maximum(edges, THIN), np.zeros(3))
    return replace(part, centre=parent.support(direction) + shift - part.support(-direction))


def _shift(rng: np.random.Generator, parent: Part, direction: np.ndarray, fraction: float) -> np.ndarray:
    """A random offset (3,) across `direction`, up to a fraction of the parent's half extents, or none."""
    offset = rng.uniform(-fraction, fraction, 3) * parent.extents() / 2 * (1 - np.abs(direction))
    return offset * (rng.random(3) < 0.5)


def _stack(rng: np.random.Generator, parent: Part) -> list[Part]:
    """A solid on top of another, or below it."""
    primitive, edges = _solid(rng)
    direction = Z if rng.random() < 0.8 else -Z
    scale = rng.uniform(0.4, 1.15) * parent.extents()[:2].max() / edges.max()
    shift = _shift(rng, parent, direction, 0.5) * (1, 0, 1)  # symmetric in y
    return [_attach(parent, direction, (primitive, edges * scale), _rotation(rng), shift)]


def _end(rng: np.random.Generator, parent: Part) -> list[Part]:
    """A solid in front or at the back."""
    primitive, edges = _solid(rng)
    direction = X if rng.random() < 0.5 else -X
    shift = _shift(rng, parent, direction, 0.7) * (1, 0, 1)
    scale = rng.uniform(0.3, 0.9)
    return [_attach(parent, direction, (primitive, edges * scale), _rotation(rng), shift)]


def _sides(rng: np.random.Generator, parent: Part) -> list[Part]:
    """A pair on both sides: arms, wings, ears."""
    primitive, edges = _solid(rng)
    edges = edges * rng.uniform(0.3, 0.8) * rng.choice([0.4, 1.0, 1.0], 3)
    part = _attach(parent, Y, (primitive, edges), _rotation(rng), _shift(rng, parent, Y, 0.8))
    return [part, part.transformed(MIRROR)]


def _wheels(rng: np.random.Generator, parent: Part) -> list[Part]:
    """Two or four wheels at the sides, low."""
    radius = rng.uniform(0.14, 0.3)
    tyre = primitives.torus(0.32) if rng.random() < 0.4 else primitives.frustum(primitives.ROUND, 1.0)
    edges = np.array([2 * radius, 2 * radius, rng.uniform(0.1, 0.2)])
    lying = tf.rotation_matrix(np.pi / 2, X)[:3, :3]
    reach, low = parent.extents()[0] * rng.uniform(0.25, 0.42), -parent.extents()[2] * rng.uniform(0.2, 0.45)
    places = (reach, -reach) if rng.random() < 0.6 else (0.0,)
    wheels = [_attach(parent, Y, (tyre, edges), lying, np.array([x, 0, low])) for x in places]
    return [*wheels, *(wheel.transformed(MIRROR) for wheel in wheels)]


def _legs(rng: np.random.Generator, parent: Part) -> list[Part]:
    """Two to four legs at the corners of the underside, or three around its centre."""
    width, height = rng.uniform(0.1, 0.22), rng.uniform(0.25, 0.9)
    sections, top = int(rng.choice([4, primitives.ROUND])), float(rng.choice([1.0, 1.0, 0.6]))
    leg = primitives.frustum(sections, top)
    upside_down = np.diag([1.0, -1.0, -1.0])
    x, y = parent.extents()[:2] * rng.uniform(0.28, 0.42, 2)
    count = int(rng.integers(2, 5))
    corners = [(x, y), (x, -y), (-x, y), (-x, -y)] if count == 4 else [(0, y), (0, -y)]
    if count == 3:
        corners = [(-x, 0), (x / 2, 0.87 * y), (x / 2, -0.87 * y)]
    edges = np.array([width, width, height])
    return [_attach(parent, -Z, (leg, edges), upside_down, np.array([*corner, 0])) for corner in corners]


def _handle(rng: np.random.Generator, parent: Part) -> list[Part]:
    """A ring half sunk into a side or the top."""
    direction = (Y, X, -X, Z)[rng.integers(4)]
    normal = X if direction is Z else Z if rng.random() < 0.3 else np.cross(direction, Z)
    rotation = np.eye(3) if normal is Z else tf.rotation_matrix(np.pi / 2, np.cross(Z, normal))[:3, :3]
    tube, size = float(rng.choice([0.2, 0.28])), rng.uniform(0.35, 0.75)
    ring = _attach(
        parent, direction, (primitives.torus(tube), size * np.array([1, 1, tube])), rotation, np.zeros(3)
    )
    ring = replace(ring, centre=ring.centre - direction * size * rng.uniform(0.0, 0.4))
    return [ring, ring.transformed(MIRROR)] if direction is Y and rng.random() < 0.6 else [ring]


def _collar(rng: np.random.Generator, parent: Part) -> list[Part]:
    """A ring around a part."""
    tube = float(rng.choice([0.12, 0.2]))
    width = parent.extents()[:2].max() / (1 - tube) * rng.uniform(0.9, 1.02)
    primitive = primitives.torus(tube) if rng.random() < 0.7 else primitives.tube(0.78)
    height = parent.extents()[2] * rng.uniform(-0.4, 0.4) * Z
    edges = width * np.array([1, 1, tube * rng.uniform(0.8, 1.6)])
    return [Part(primitive, np.diag(np.maximum(edges, THIN)), parent.centre + height)]


def _mast(rng: np.random.Generator, parent: Part) -> list[Part]:
    """A thin rod with a solid at its end, upwards or ahead."""
    direction = Z if rng.random() < 0.7 else X
    rotation = np.eye(3) if direction is Z else tf.rotation_matrix(np.pi / 2, Y)[:3, :3]
    rod = (primitives.frustum(primitives.ROUND, 1.0), np.array([0.1, 0.1, rng.uniform(0.3, 0.7)]))
    primitive, edges = _solid(rng)
    stem = _attach(parent, direction, rod, rotation, np.zeros(3))
    return [
        stem,
        _attach(stem, direction, (primitive, edges * rng.uniform(0.25, 0.7)), _rotation(rng), 0 * X),
    ]


def _row(rng: np.random.Generator, parent: Part) -> list[Part]:
    """Two or three equal solids on top, along x or y."""
    primitive, edges = _solid(rng)
    axis, count = int(rng.integers(2)), int(rng.integers(2, 4))
    reach = parent.extents()[axis] * 0.34
    solid = (primitive, edges * rng.uniform(0.2, 0.35) * (1, 1, rng.uniform(0.8, 2)))
    offsets = np.linspace(-reach, reach, count)[:, None] * np.eye(3)[axis]
    return [_attach(parent, Z, solid, np.eye(3), offset) for offset in offsets]


FEATURES: dict[Callable[[np.random.Generator, Part], list[Part]], float] = {
    **{_stack: 0.28, _sides: 0.2, _end: 0.12, _legs: 0.1, _wheels: 0.08},
    **{_handle: 0.06, _collar: 0.05, _mast: 0.06, _row: 0.05},
}


def _is_sound(new: list[Part], parts: list[Part]) -> bool:
    """Whether each part touches an earlier one and is visible, and the assembly is no needle or sheet."""
    every = [*parts, *new]
    for i in range(len(parts), len(every)):
        if not any(touch(every[i], other) for other in every[:i]):
            return False
    extents = np.sort(np.ptp(np.concatenate([part.vertices() for part in every]), axis=0))
    if (extents[:2] < np.array(MIN_EXTENTS) * extents[2]).any():
        return False
    if min(part.extents().max() for part in every) < MIN_PART * extents[2]:
        return False
    return all(hidden(part, [other for other in every if other is not part]) < MAX_HIDDEN for part in every)


def _layout(rng: np.random.Generator) -> list[Part]:
    """The parts of an assembly, each touching an earlier one."""
    primitive, edges = _solid(rng)
    parts = [Part(primitive, _rotation(rng) * edges * rng.uniform(0.8, 1.2), np.zeros(3))]
    size = int(rng.integers(MIN_PARTS, MAX_PARTS + 1))
    attempts = 0
    while len(parts) < MIN_PARTS or (len(parts) < size and attempts < ATTEMPTS):
        attempts += 1
        feature = list(FEATURES)[int(rng.choice(len(FEATURES), p=list(FEATURES.values())))]
        parent = parts[0] if rng.random() < 0.5 else parts[int(rng.integers(len(parts)))]
        new = feature(rng, parent)
        if len(new) == 1 and abs(parent.centre[1]) > 1e-6:  # on one part of a pair: on the other too
            new = [new[0], new[0].transformed(MIRROR)]
        if len(parts) + len(new) <= size and _is_sound(new, parts):
            number = parts[-1].feature + 1
            parts += [replace(part, feature=number) for part in new]
    return parts


def _pose(rng: np.random.Generator) -> np.ndarray:
    """Rotation (3, 3) of the whole: mostly by quarter turns about z."""
    quarter = tf.rotation_matrix(np.pi / 2 * rng.integers(4), Z)[:3, :3]
    oblique = tf.rotation_matrix(rng.uniform(0, 2 * np.pi), Z)[:3, :3]
    tipped = tf.rotation_matrix(np.pi / 2, X)[:3, :3] @ quarter
    return (quarter, oblique, tipped)[int(rng.choice(3, p=[0.8, 0.12, 0.08]))]


def assembly_parts(seed: int) -> tuple[list[Part], list[Finish]]:
    """The parts of an assembly before it is centred and scaled, and the finishes of its features."""
    rng = np.random.default_rng(seed)
    parts = _layout(rng)
    pose = _pose(rng)
    return [part.transformed(pose) for part in parts], sample_finishes(rng, parts[-1].feature + 1)


def make_assembly(seed: int) -> Shape:
    """An unnamed object of 2 to 7 primitives in their own colours, a pure function of the seed."""
    parts, finishes = assembly_parts(seed)
    coloured: list[ColouredMesh] = [(part.mesh(), finishes[part.feature].colour) for part in parts]
    shape = join_smooth(f"assembly {seed}", coloured, has_front=False)
    # The map of the layout to the mesh of the shape.
    before = parts[0].vertices()
    after = np.asarray(shape.mesh.vertices[: len(before)])
    scale = np.linalg.norm(np.ptp(after, axis=0)) / np.linalg.norm(np.ptp(before, axis=0))
    patterns, first = [], 0
    for part in parts:
        finish, last = finishes[part.feature], first + len(part.primitive.faces)
        texture = texture_of(finish, part, after[0] + scale * (part.centre - before[0]), float(scale))
        if texture is not None:
            patterns.append(Pattern(first, last, texture, finish.second))
        first = last
    return replace(shape, patterns=tuple(patterns))
