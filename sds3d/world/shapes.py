"""The meshes of the world: primitives, everyday objects composed of them, and well-known models.

Every mesh is z-up with its front towards +x, centred on its bounding box and scaled into the ball of radius
`RADIUS`. Some faces have a fixed accent colour, the others the colour that the caption names.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh
from trimesh import transformations as tf

from distill.runtime.errors import UserError
from sds3d.world.textures import Pattern

RADIUS = 0.8
SMOOTH_ANGLE = np.deg2rad(35)  # edges with a larger angle between their faces are creases
ASSETS = Path(__file__).parents[1] / "assets" / "meshes"
COLOURS = {
    "red": (0.85, 0.10, 0.10),
    "orange": (0.96, 0.50, 0.06),
    "yellow": (0.95, 0.87, 0.15),
    "green": (0.12, 0.62, 0.18),
    "cyan": (0.15, 0.82, 0.85),
    "blue": (0.13, 0.22, 0.85),
    "purple": (0.48, 0.12, 0.68),
    "pink": (0.98, 0.55, 0.76),
}
DARK, WHITE, BROWN, GLASS = (0.15, 0.15, 0.17), (0.93, 0.93, 0.93), (0.45, 0.28, 0.15), (0.62, 0.75, 0.83)
ORANGE = (0.95, 0.45, 0.1)

Vector = tuple[float, float, float]
ORIGIN: Vector = (0, 0, 0)
ColouredMesh = tuple[trimesh.Trimesh, Vector | np.ndarray | None]  # None: the colour that the caption names


@dataclass(frozen=True)
class Shape:
    """A mesh of the world."""

    name: str
    mesh: trimesh.Trimesh
    accents: np.ndarray  # (F, 3) fixed albedo in [0, 1] of the faces, NaN for the caption's colour
    has_front: bool
    patterns: tuple[Pattern, ...] = ()  # solid textures, in the axes of the mesh

    def albedo(self, colour: np.ndarray) -> np.ndarray:
        """Face colours (F, 3), `colour` (3,) where there is no accent; without the patterns."""
        return np.where(np.isnan(self.accents), colour, self.accents)

    def colours_at(self, points: np.ndarray, faces: np.ndarray, colour: np.ndarray) -> np.ndarray:
        """Albedo (N, 3) of surface points (N, 3) on faces (N,), `colour` (3,) where there is no accent."""
        colours = self.albedo(colour)[faces]
        for pattern in self.patterns:
            pattern.paint(colours, points, faces)
        return colours


def _placed(mesh: trimesh.Trimesh, offset: Vector, tilt: Vector = ORIGIN) -> trimesh.Trimesh:
    mesh.apply_transform(tf.translation_matrix(offset) @ tf.euler_matrix(*np.deg2rad(tilt)))
    return mesh


def _box(x: float, y: float, z: float, offset: Vector = ORIGIN, tilt: Vector = ORIGIN) -> trimesh.Trimesh:
    return _placed(trimesh.creation.box((x, y, z)), offset, tilt)


def _rod(radius: float, height: float, offset: Vector = ORIGIN, tilt: Vector = ORIGIN) -> trimesh.Trimesh:
    return _placed(trimesh.creation.cylinder(radius, height, sections=32), offset, tilt)


def _cone(
    radius: float, height: float, offset: Vector = ORIGIN, tilt: Vector = ORIGIN, sections: int = 32
) -> trimesh.Trimesh:
    return _placed(trimesh.creation.cone(radius, height, sections=sections), offset, tilt)


def _ball(radius: float, offset: Vector = ORIGIN, stretch: Vector = (1, 1, 1)) -> trimesh.Trimesh:
    mesh = trimesh.creation.icosphere(3, radius)
    mesh.apply_scale(stretch)
    return _placed(mesh, offset)


def _tapered(
    bottom: tuple[float, float], top: tuple[float, float], height: float, offset: Vector = ORIGIN
) -> trimesh.Trimesh:
    mesh = _box(1, 1, height)
    high = mesh.vertices[:, 2] > 0
    mesh.vertices[:, :2] *= np.where(high[:, None], top, bottom)
    return _placed(mesh, offset)


def _prism(width: float, depth: float, height: float, offset: Vector = ORIGIN) -> trimesh.Trimesh:
    """A roof: ridge along x, (depth, width, height) in x, y, z, base at z = 0."""
    mesh = _box(depth, width, height, (0, 0, height / 2))
    mesh.vertices[mesh.vertices[:, 2] > height / 2, 1] = 0
    mesh.merge_vertices()
    mesh.update_faces(mesh.nondegenerate_faces())
    return _placed(mesh, offset)


def _cube() -> list[ColouredMesh]:
    return [(_box(1, 1, 1), None)]


def _sphere() -> list[ColouredMesh]:
    return [(_ball(1), None)]


def _cylinder() -> list[ColouredMesh]:
    return [(_rod(0.5, 1.2), None)]


def _cone_alone() -> list[ColouredMesh]:
    return [(_cone(0.6, 1.2), None)]


def _pyramid() -> list[ColouredMesh]:
    return [(_cone(0.8, 1.0, tilt=(0, 0, 45), sections=4), None)]


def _torus() -> list[ColouredMesh]:
    return [(trimesh.creation.torus(0.65, 0.25, major_sections=48, minor_sections=24), None)]


def _capsule() -> list[ColouredMesh]:
    return [(trimesh.creation.capsule(1.0, 0.4, count=(24, 24)), None)]


def _mug() -> list[ColouredMesh]:
    wall = trimesh.creation.annulus(0.43, 0.5, 1.1, sections=40)
    handle = trimesh.creation.torus(0.3, 0.075, major_sections=32, minor_sections=16)
    return [
        (wall, None),
        (_rod(0.5, 0.1, (0, 0, -0.5)), None),
        (_placed(handle, (0, 0.55, 0), (0, 90, 0)), None),
    ]


def _chair() -> list[ColouredMesh]:
    legs = [(_box(0.1, 0.1, 0.6, (x, y, -0.3)), BROWN) for x in (-0.35, 0.35) for y in (-0.35, 0.35)]
    return [*legs, (_box(0.84, 0.84, 0.12), None), (_box(0.12, 0.84, 0.9, (-0.36, 0, 0.45)), None)]


def _table() -> list[ColouredMesh]:
    legs = [(_box(0.1, 0.1, 0.7, (x, y, -0.38)), BROWN) for x in (-0.45, 0.45) for y in (-0.65, 0.65)]
    return [*legs, (_box(1.1, 1.5, 0.1), None)]


def _car() -> list[ColouredMesh]:
    wheels = [(_rod(0.2, 0.14, (x, y, -0.2), (90, 0, 0)), DARK) for x in (-0.5, 0.5) for y in (-0.36, 0.36)]
    lights = [(_ball(0.09, (0.8, y, 0.06)), WHITE) for y in (-0.24, 0.24)]
    windows = [
        _tapered((0.86, 0.70), (0.52, 0.56), 0.30, (-0.15, 0, 0.32)),
        _tapered((0.80, 0.72), (0.50, 0.585), 0.25, (-0.15, 0, 0.31)),
    ]
    roof = _box(0.56, 0.58, 0.06, (-0.15, 0, 0.49))
    body = _box(1.64, 0.76, 0.3, (0, 0, 0.02))
    return [*wheels, *lights, (windows[0], GLASS), (windows[1], GLASS), (roof, None), (body, None)]


def _house() -> list[ColouredMesh]:
    panes = [(_box(0.04, 0.2, 0.2, (0.5, y, 0.12)), GLASS) for y in (-0.28, 0.28)]
    door = (_box(0.04, 0.2, 0.38, (0.5, 0, -0.21)), DARK)
    return [(_box(1.0, 1.0, 0.8), None), (_prism(1.2, 1.14, 0.5, (0, 0, 0.4)), BROWN), door, *panes]


def _snowman() -> list[ColouredMesh]:
    eyes = [(_ball(0.05, (0.25, y, 0.98)), DARK) for y in (-0.1, 0.1)]
    buttons = [(_ball(0.05, (0.36 + lift, 0, 0.35 + z)), DARK) for z, lift in ((0.05, 0.0), (0.2, -0.05))]
    nose = (_cone(0.07, 0.3, (0.25, 0, 0.9), (0, 90, 0)), ORANGE)
    hat = [(_rod(0.3, 0.05, (0, 0, 1.13)), None), (_rod(0.2, 0.25, (0, 0, 1.27)), None)]
    scarf = _placed(trimesh.creation.torus(0.24, 0.08, major_sections=32, minor_sections=12), (0, 0, 0.7))
    balls = [(_ball(r, (0, 0, z)), WHITE) for r, z in ((0.5, -0.25), (0.38, 0.4), (0.28, 0.9))]
    return [*balls, *eyes, *buttons, nose, *hat, (scarf, None)]


def _rocket() -> list[ColouredMesh]:
    fins = [
        (_box(0.42, 0.06, 0.4, (0.34 * np.cos(a), 0.34 * np.sin(a), -0.5), (0, 0, np.rad2deg(a))), DARK)
        for a in np.arange(4) * np.pi / 2
    ]
    window = (_ball(0.13, (0.25, 0, 0.3)), GLASS)
    return [(_rod(0.3, 1.3), None), (_cone(0.3, 0.5, (0, 0, 0.65)), WHITE), window, *fins]


def _tree() -> list[ColouredMesh]:
    tiers = [(_cone(r, 0.6, (0, 0, z)), None) for r, z in ((0.6, -0.2), (0.48, 0.15), (0.34, 0.5))]
    return [(_rod(0.13, 0.5, (0, 0, -0.4)), BROWN), *tiers]


def _boat() -> list[ColouredMesh]:
    hull = _tapered((1.0, 0.4), (1.5, 0.66), 0.36)
    ahead = hull.vertices[:, 0] > 0
    hull.vertices[ahead, 1] *= 0.12  # the bow
    hull.vertices[ahead, 0] *= 1.3
    sail = _cone(0.5, 1.0, (0.05, 0, 0.25), sections=4)
    sail.vertices[:, 1] *= 0.12
    return [
        (hull, None),
        (_rod(0.04, 1.2, (0.05, 0, 0.7)), BROWN),
        (sail, WHITE),
        (_box(0.4, 0.4, 0.26, (-0.55, 0, 0.3)), DARK),
    ]


def _duck() -> list[ColouredMesh]:
    """A bath duck; the well-known model (COLLADA's) has no free licence."""
    bill = _ball(0.14, (0.62, 0, 0.5), (1.3, 1.0, 0.4))
    eyes = [(_ball(0.05, (0.54, y, 0.62)), DARK) for y in (-0.15, 0.15)]
    wings = [(_ball(0.3, (-0.12, y, 0.02), (1.2, 0.35, 0.7)), None) for y in (-0.42, 0.42)]
    tail = _cone(0.24, 0.55, (-0.5, 0, 0.08), (0, -50, 0))
    return [
        (_ball(0.5, (0, 0, -0.05), (1.35, 0.95, 0.75)), None),
        (_ball(0.32, (0.32, 0, 0.53)), None),
        (bill, ORANGE),
        (tail, None),
        *eyes,
        *wings,
    ]


def _robot() -> list[ColouredMesh]:
    eyes = [(_ball(0.07, (0.22, y, 0.72)), DARK) for y in (-0.11, 0.11)]
    limbs = [(_box(0.16, 0.14, 0.55, (0, y, 0.12)), DARK) for y in (-0.42, 0.42)]
    legs = [(_box(0.24, 0.2, 0.4, (0.04, y, -0.5)), DARK) for y in (-0.16, 0.16)]
    chest = (_box(0.04, 0.34, 0.2, (0.25, 0, 0.15)), WHITE)
    return [
        (_box(0.5, 0.68, 0.7, (0, 0, 0.07)), None),
        (_box(0.44, 0.5, 0.38, (0, 0, 0.65)), None),
        chest,
        *eyes,
        *limbs,
        *legs,
    ]


COMPOSED: dict[str, tuple[Callable[[], list[ColouredMesh]], bool]] = {
    "cube": (_cube, False),
    "sphere": (_sphere, False),
    "cylinder": (_cylinder, False),
    "cone": (_cone_alone, False),
    "pyramid": (_pyramid, False),
    "torus": (_torus, False),
    "capsule": (_capsule, False),
    "mug": (_mug, True),
    "chair": (_chair, True),
    "table": (_table, False),
    "car": (_car, True),
    "house": (_house, True),
    "snowman": (_snowman, True),
    "rocket": (_rocket, False),
    "tree": (_tree, False),
    "boat": (_boat, True),
    "robot": (_robot, True),
    "duck": (_duck, True),
}
REAL = ("teapot", "teddy", "monkey", "airplane", "bunny")  # sources and licences: assets/meshes/SOURCES.md
OBJECTS = (*COMPOSED, *REAL)
RELATIONS = ("on top of", "next to", "in front of")


def noun_phrase(colour: str, name: str) -> str:
    """`an orange car`."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {name}"


def _parts(name: str) -> tuple[list[ColouredMesh], bool]:
    if name in COMPOSED:
        build, has_front = COMPOSED[name]
        return build(), has_front
    if name in REAL:
        return [(trimesh.load_mesh(ASSETS / f"{name}.ply", process=False), None)], True
    raise UserError(f"the world has no object {name!r}: expected one of {', '.join(OBJECTS)}")


def _joined(name: str, parts: list[ColouredMesh], has_front: bool, radius: float = RADIUS) -> Shape:
    """One mesh of all parts with sharp creases, centred on its bounding box and scaled to the radius."""
    smooth = [(trimesh.graph.smooth_shade(part, angle=SMOOTH_ANGLE), colour) for part, colour in parts]
    return join_smooth(name, smooth, has_front, radius)


def join_smooth(name: str, parts: list[ColouredMesh], has_front: bool, radius: float = RADIUS) -> Shape:
    """One mesh of parts that have their vertex normals, centred on its bounding box and scaled."""
    accents = [np.broadcast_to(np.nan if c is None else c, (len(mesh.faces), 3)) for mesh, c in parts]
    mesh = trimesh.util.concatenate([mesh for mesh, _ in parts]) if len(parts) > 1 else parts[0][0]
    mesh.apply_translation(-mesh.bounds.mean(axis=0))
    mesh.apply_scale(radius / np.linalg.norm(mesh.vertices, axis=1).max())
    return Shape(name, mesh, np.concatenate(accents).astype(np.float64), has_front)


@functools.lru_cache(maxsize=64)
def make_shape(name: str) -> Shape:
    """The object of a name, within the ball of radius `RADIUS`. Raises `UserError` for an unknown name."""
    parts, has_front = _parts(name)
    return _joined(name, parts, has_front)


def make_pair(first: Shape, relation: str, second: Shape, colours: tuple[np.ndarray, np.ndarray]) -> Shape:
    """`first` in a relation to `second`, each in its colour (3,); centred and scaled like a single object.

    `on top of` is on the other's highest point; `next to` is on its +y side and `in front of` on its +x side,
    on the same ground.
    """
    if relation not in RELATIONS:
        raise UserError(f"relation {relation!r} is unknown: expected one of {', '.join(RELATIONS)}")
    one, two = first.mesh.copy(), second.mesh.copy()
    axis = {"on top of": 2, "next to": 1, "in front of": 0}[relation]
    offset = np.zeros(3)
    offset[axis] = two.bounds[1][axis] - one.bounds[0][axis] + (0.0 if axis == 2 else 0.1)
    if axis != 2:
        offset[2] = two.bounds[0][2] - one.bounds[0][2]
    one.apply_translation(offset)
    mesh = trimesh.util.concatenate([one, two])
    mesh.apply_translation(-mesh.bounds.mean(axis=0))
    mesh.apply_scale(RADIUS / np.linalg.norm(mesh.vertices, axis=1).max())
    accents = np.concatenate([first.albedo(colours[0]), second.albedo(colours[1])])
    return Shape(f"{first.name} {relation} {second.name}", mesh, accents, False)
