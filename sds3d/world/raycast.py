"""Ray-cast renders of meshes with world-fixed lights: RGBA, depth and normals, on the CPU (embree)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import trimesh
from torch import Tensor

from sds3d.scene.cameras import Cameras
from sds3d.world.segments import face_parts

Albedo = np.ndarray | Callable[[np.ndarray, np.ndarray], np.ndarray]
AMBIENT = 0.5
# Direction towards the light, and its strength; fixed in the world.
LIGHTS = (((0.35, -0.6, 1.0), 0.5), ((-0.5, 0.8, 0.3), 0.15))


@dataclass(frozen=True)
class Render:
    """One view; depth and normal are 0 where nothing is hit."""

    rgba: np.ndarray  # (H, W, 4) in [0, 1], alpha not premultiplied
    depth: np.ndarray  # (H, W) distance from the camera
    normal: np.ndarray  # (H, W, 3) unit, world axes
    face: np.ndarray  # (H, W) int64, the highest index of those that a pixel's rays hit; -1 for none


class RayCaster:
    """First hits of rays with one mesh, whose acceleration structure is built once."""

    def __init__(self, mesh: trimesh.Trimesh) -> None:
        from embreex import rtcore_scene
        from embreex.mesh_construction import TriangleMesh

        self.mesh, self.faces = mesh, mesh.faces
        self.corner_normals = np.asarray(mesh.vertex_normals, np.float32)[mesh.faces]  # (F, 3, 3)
        self.scene = rtcore_scene.EmbreeScene()
        self.geometry = TriangleMesh(self.scene, mesh.vertices[mesh.faces].astype(np.float32))

    @cached_property
    def parts(self) -> np.ndarray:
        """`face_parts` (F + 1,), and 0 for the index -1 of a miss."""
        return np.append(face_parts(self.mesh), np.uint8(0))

    def cast(self, origins: Tensor, directions: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For rays (..., 3): face index (N,); distance (N,); smooth unit normals (N, 3). Miss: -1, any, 0."""
        starts, rays = (
            np.ascontiguousarray(value.reshape(-1, 3).numpy(), np.float32) for value in (origins, directions)
        )
        hits = self.scene.run(starts, rays, output=1)
        face = hits["primID"].astype(np.int64)
        rows = np.flatnonzero(face >= 0)
        normals = np.zeros((len(face), 3), np.float32)
        normals[rows] = self._normals(face[rows], hits["u"][rows, None], hits["v"][rows, None], rays[rows])
        return face, hits["tfar"], normals

    def _normals(self, face: np.ndarray, u: np.ndarray, v: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Unit normals (N, 3) at barycentric coordinates (N, 1) of faces (N,) hit by rays (N, 3)."""
        corners = self.corner_normals[face]
        normal = corners[:, 0] * (1 - u - v) + corners[:, 1] * u + corners[:, 2] * v
        normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
        # The inside of an open surface.
        normal *= np.where((normal * rays).sum(1, keepdims=True) > 0.3, -1, 1)
        return normal


def shade(albedo: np.ndarray, normal: np.ndarray, light_rotation: float = 0.0) -> np.ndarray:
    """Lambertian colours (N, 3) of albedo and unit normals (N, 3), lights rotated about z by radians."""
    light = np.full(len(normal), AMBIENT, np.float32)
    cos, sin = np.cos(light_rotation), np.sin(light_rotation)
    for (x, y, z), strength in LIGHTS:
        direction = np.array([cos * x - sin * y, sin * x + cos * y, z], np.float32)
        light += strength * np.maximum(normal @ (direction / np.linalg.norm(direction)), 0)
    return np.clip(albedo * light[:, None], 0, 1)


def render(
    caster: RayCaster, albedo: Albedo, camera: Cameras, supersample: int = 2, light_rotation: float = 0.0
) -> Render:
    """The view of one camera with supersample x supersample rays per pixel.

    The albedo in [0, 1] is that of the faces (F, 3), or a function of the hit points (N, 3) and faces (N,).
    """
    size, k = camera.resolution, supersample
    origins, directions = camera.with_resolution(size * k).rays()
    face, distance, normal = caster.cast(origins, directions)
    rows = np.flatnonzero(face >= 0)
    if isinstance(albedo, np.ndarray):
        base = albedo[face[rows]]
    else:
        position, rays = camera.position[0].numpy(), directions.reshape(-1, 3).numpy()
        base = albedo(position + distance[rows, None] * rays[rows], face[rows])
    colour = shade(base.astype(np.float32), normal[rows], light_rotation)
    values = np.zeros((len(face), 8), np.float32)  # colour, distance, normal, hit
    values[rows] = np.concatenate([colour, distance[rows, None], normal[rows], np.ones((len(rows), 1))], 1)
    subpixels = values.reshape(size, k, size, k, 8)
    # Six times as fast as `subpixels.sum((1, 3))`, in the same order.
    sums = sum((subpixels[:, i, :, j] for i in range(k) for j in range(k)), np.zeros(8, np.float32))
    count = sums[..., 7:]
    mean = sums / np.maximum(count, 1)
    rgba = np.concatenate([mean[..., :3], count / (k * k)], -1)
    length = np.linalg.norm(mean[..., 4:7], axis=-1, keepdims=True)
    faces = face.reshape(size, k, size, k).max((1, 3))
    return Render(rgba, mean[..., 3], mean[..., 4:7] / np.maximum(length, 1e-9), faces)
