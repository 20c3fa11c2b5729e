"""Ray-cast renders of meshes with world-fixed lights: RGBA, depth and normals, on the CPU (embree)."""

from dataclasses import dataclass

import numpy as np
import trimesh
from torch import Tensor

from sds3d.scene.cameras import Cameras

AMBIENT = 0.5
# Direction towards the light, and its strength; fixed in the world.
LIGHTS = (((0.35, -0.6, 1.0), 0.5), ((-0.5, 0.8, 0.3), 0.15))


@dataclass(frozen=True)
class Render:
    """One view; depth and normal are 0 where nothing is hit."""

    rgba: np.ndarray  # (H, W, 4) in [0, 1], alpha not premultiplied
    depth: np.ndarray  # (H, W) distance from the camera
    normal: np.ndarray  # (H, W, 3) unit, world axes


class RayCaster:
    """First hits of rays with one mesh, whose acceleration structure is built once."""

    def __init__(self, mesh: trimesh.Trimesh) -> None:
        from embreex import rtcore_scene
        from embreex.mesh_construction import TriangleMesh

        self.faces = mesh.faces
        self.vertex_normals = np.asarray(mesh.vertex_normals, np.float32)
        self.scene = rtcore_scene.EmbreeScene()
        self.geometry = TriangleMesh(self.scene, mesh.vertices[mesh.faces].astype(np.float32))

    def cast(self, origins: Tensor, directions: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For rays (..., 3): face index (N,), -1 for a miss; distance (N,); smooth unit normals (N, 3)."""
        starts, rays = (
            np.ascontiguousarray(value.reshape(-1, 3).numpy(), np.float32) for value in (origins, directions)
        )
        hits = self.scene.run(starts, rays, output=1)
        face = hits["primID"].astype(np.int64)
        u, v = hits["u"][:, None], hits["v"][:, None]
        corners = self.vertex_normals[self.faces[np.maximum(face, 0)]]
        normal = corners[:, 0] * (1 - u - v) + corners[:, 1] * u + corners[:, 2] * v
        normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
        # The inside of an open surface.
        normal *= np.where((normal * rays).sum(1, keepdims=True) > 0.3, -1, 1)
        return face, hits["tfar"], normal


def shade(albedo: np.ndarray, normal: np.ndarray, light_rotation: float = 0.0) -> np.ndarray:
    """Lambertian colours (N, 3) of albedo and unit normals (N, 3), lights rotated about z by radians."""
    light = np.full(len(normal), AMBIENT, np.float32)
    cos, sin = np.cos(light_rotation), np.sin(light_rotation)
    for (x, y, z), strength in LIGHTS:
        direction = np.array([cos * x - sin * y, sin * x + cos * y, z], np.float32)
        light += strength * np.maximum(normal @ (direction / np.linalg.norm(direction)), 0)
    return np.clip(albedo * light[:, None], 0, 1)


def render(
    caster: RayCaster,
    face_albedo: np.ndarray,
    camera: Cameras,
    supersample: int = 2,
    light_rotation: float = 0.0,
) -> Render:
    """The view of one camera with supersample x supersample rays per pixel; face_albedo (F, 3) in [0, 1]."""
    size, k = camera.resolution, supersample
    face, distance, normal = caster.cast(*camera.with_resolution(size * k).rays())
    hit = (face >= 0).astype(np.float32)
    colour = shade(face_albedo[np.maximum(face, 0)].astype(np.float32), normal, light_rotation)

    def pool(values: np.ndarray) -> np.ndarray:
        return (values * hit[:, None]).reshape(size, k, size, k, -1).sum((1, 3))

    count = pool(np.ones_like(hit)[:, None])
    sums = [pool(colour), pool(np.where(hit > 0, distance, 0)[:, None]), pool(normal)]
    mean = np.concatenate(sums, -1) / np.maximum(count, 1)
    rgba = np.concatenate([mean[..., :3], count / (k * k)], -1)
    length = np.linalg.norm(mean[..., 4:], axis=-1, keepdims=True)
    return Render(rgba, mean[..., 3], mean[..., 4:] / np.maximum(length, 1e-9))
