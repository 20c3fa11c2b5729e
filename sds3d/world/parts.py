"""Primitives in their places: affine maps of the unit box, where they touch and what they hide."""

from dataclasses import dataclass

import numpy as np
import trimesh

from sds3d.world.primitives import Primitive

MIRROR = np.diag([1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Part:
    """A primitive mapped by x -> linear x + centre; parts of one feature have one finish."""

    primitive: Primitive
    linear: np.ndarray  # (3, 3)
    centre: np.ndarray  # (3,)
    feature: int = 0

    def to_world(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 3) of the unit box in the axes of the assembly."""
        return points @ self.linear.T + self.centre

    def to_local(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 3) of the assembly in the unit box."""
        return (points - self.centre) @ np.linalg.inv(self.linear).T

    def vertices(self) -> np.ndarray:
        """Those of the surface (V, 3)."""
        return self.to_world(self.primitive.vertices)

    def extents(self) -> np.ndarray:
        """Edges (3,) of the bounding box."""
        return np.ptp(self.vertices(), axis=0)

    def support(self, direction: np.ndarray) -> np.ndarray:
        """A point (3,) in the solid near its surface, farthest along `direction` (3,)."""
        points = self.to_world(self.primitive.interior)
        heights = points @ direction
        if not self.primitive.convex:
            return points[heights.argmax()]
        return points[heights > heights.max() - 1e-6].mean(0)

    def transformed(self, matrix: np.ndarray) -> "Part":
        """The part after a linear map (3, 3) of the assembly."""
        return Part(self.primitive, matrix @ self.linear, matrix @ self.centre, self.feature)

    def mesh(self) -> trimesh.Trimesh:
        """Its surface with smooth vertex normals."""
        normals = self.primitive.normals @ np.linalg.inv(self.linear)
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        mirrored = np.linalg.det(self.linear) < 0
        faces = self.primitive.faces[:, ::-1] if mirrored else self.primitive.faces
        return trimesh.Trimesh(self.vertices(), faces, vertex_normals=normals, process=False)


def touch(one: Part, two: Part) -> bool:
    """Whether two solids share a point of the interior of both; never true of two rings."""
    pairs = ((one, two), (two, one))
    return any(
        bool(solid.primitive.contains(solid.to_local(other.to_world(other.primitive.interior))).any())
        for solid, other in pairs
    )


def hidden(part: Part, others: list[Part]) -> float:
    """Fraction of a part's vertices that lie in other solids."""
    points = part.vertices()
    inside = np.zeros(len(points), bool)
    for other in others:
        inside |= other.primitive.contains(other.to_local(points))
    return float(inside.mean())
