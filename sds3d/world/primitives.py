"""Solids in the unit box [-0.5, 0.5]^3, of which assemblies are composed by affine maps."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import trimesh

from sds3d.world.shapes import SMOOTH_ANGLE

SHRINK = 0.94  # of a convex solid's vertices towards its centre: points in its interior
ROUND = 32  # sections of round solids
RING_POINTS = 24


@dataclass(frozen=True)
class Primitive:
    """A closed surface with smooth vertex normals and sharp creases."""

    vertices: np.ndarray  # (V, 3)
    faces: np.ndarray  # (F, 3)
    normals: np.ndarray  # (V, 3) unit
    interior: np.ndarray  # (K, 3) points in the solid
    convex: bool

    @cached_property
    def planes(self) -> tuple[np.ndarray, np.ndarray]:
        """Outward normals (P, 3) and offsets (P,) of the half-spaces that bound a convex solid."""
        corners = self.vertices[self.faces]
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        planes = np.unique(np.round(np.c_[normals, (normals * corners[:, 0]).sum(1)], 6), axis=0)
        return planes[:, :3], planes[:, 3]

    def contains(self, points: np.ndarray) -> np.ndarray:
        """Whether points (N, 3) are in the solid (N,); of a ring, which is not convex, none are."""
        if not self.convex:
            return np.zeros(len(points), bool)
        normals, offsets = self.planes
        inside = np.abs(points).max(1) < 0.5  # in the box; most points are not
        inside[inside] = (points[inside] @ normals.T < offsets).all(1)
        return inside


def _primitive(mesh: trimesh.Trimesh, ring_radius: float = 0.0) -> Primitive:
    """A mesh in the unit box; a ring has the radius of its core, relative to that of its outside."""
    mesh.apply_translation(-mesh.bounds.mean(0))
    mesh.apply_scale(1 / mesh.extents)
    smooth = trimesh.graph.smooth_shade(mesh, angle=SMOOTH_ANGLE)
    vertices = np.asarray(smooth.vertices)
    if ring_radius:
        angle = np.arange(RING_POINTS) * 2 * np.pi / RING_POINTS
        interior = 0.5 * ring_radius * np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1)
    else:
        centre = mesh.vertices.mean(0)
        corners = mesh.vertices[:: max(len(mesh.vertices) // 80, 1)]
        interior = np.concatenate([centre[None], centre + SHRINK * (corners - centre)])
    normals = np.asarray(smooth.vertex_normals)
    return Primitive(vertices, np.asarray(smooth.faces), normals, interior, not ring_radius)


@lru_cache(maxsize=64)
def frustum(sections: int, top: float) -> Primitive:
    """A prism or cylinder whose upper end is `top` times as wide; 0 for a pyramid or cone."""
    if top == 0:
        mesh = trimesh.creation.cone(0.5, 1.0, sections=sections)
    else:
        mesh = trimesh.creation.cylinder(0.5, 1.0, sections=sections)
        mesh.vertices[mesh.vertices[:, 2] > 0, :2] *= top
    if sections == 4:  # sides across the axes
        mesh.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 4, (0, 0, 1)))
    return _primitive(mesh)


@lru_cache(maxsize=1)
def ball() -> Primitive:
    """A sphere."""
    return _primitive(trimesh.creation.icosphere(3, 0.5))


@lru_cache(maxsize=1)
def dome() -> Primitive:
    """The upper half of a sphere."""
    angle = np.linspace(0, np.pi / 2, 13)
    profile = np.stack([np.cos(angle), np.sin(angle)], 1)
    profile[-1, 0] = 0
    return _primitive(trimesh.creation.revolve(np.concatenate([[(0, 0)], profile]), sections=ROUND))


@lru_cache(maxsize=1)
def roof() -> Primitive:
    """A triangular prism whose ridge lies along x."""
    mesh = trimesh.creation.box((1, 1, 1))
    mesh.vertices[mesh.vertices[:, 2] > 0, 1] = 0
    mesh.merge_vertices()
    mesh.update_faces(mesh.nondegenerate_faces())
    return _primitive(mesh)


@lru_cache(maxsize=1)
def wedge() -> Primitive:
    """A ramp that rises towards -x."""
    mesh = trimesh.creation.box((1, 1, 1))
    mesh.vertices[mesh.vertices[:, 2] > 0, 0] = -0.5
    mesh.merge_vertices()
    mesh.update_faces(mesh.nondegenerate_faces())
    return _primitive(mesh)


@lru_cache(maxsize=8)
def capsule(length: int) -> Primitive:
    """A capsule along z, its cylinder `length` half-widths long; to be scaled by (1, 1, 1 + length / 2)."""
    return _primitive(trimesh.creation.capsule(float(length), 1.0, count=(ROUND, 16)))


@lru_cache(maxsize=8)
def torus(tube: float) -> Primitive:
    """A ring around z whose tube has `tube` times its outer radius; to be scaled by (1, 1, tube)."""
    mesh = trimesh.creation.torus(1 - tube, tube, major_sections=40, minor_sections=16)
    return _primitive(mesh, 1 - tube)


@lru_cache(maxsize=8)
def tube(inner: float) -> Primitive:
    """A pipe around z whose hole has `inner` times its outer radius."""
    return _primitive(trimesh.creation.annulus(inner, 1.0, 1.0, sections=ROUND), (1 + inner) / 2)
