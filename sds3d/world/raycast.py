"""Ray-cast renders of meshes with world-fixed lights: RGBA, depth and normals, on the CPU (trimesh's embreex)."""

from dataclasses import dataclass

import numpy as np
import trimesh
from torch import Tensor

from sds3d.scene.cameras import Cameras

AMBIENT = 0.5
LIGHTS = (
    ((0.35, -0.6, 1.0), 0.5),
    ((-0.5, 0.8, 0.3), 0.15),
)  # direction towards the light, strength; fixed in the world


@dataclass(frozen=True)
class Render:
    """rgba (H, W, 4) with straight alpha in [0, 1]; depth (H, W), distance from the camera, 0 where nothing is hit;
    normal (H, W, 3) in world axes, 0 where nothing is hit."""

    rgba: np.ndarray
    depth: np.ndarray
    normal: np.ndarray


class RayCaster:
    """First hits on one mesh, its acceleration structure built once."""

    def __init__(self, mesh: trimesh.Trimesh) -> None:
        from embreex import rtcore_scene
        from embreex.mesh_construction import TriangleMesh

        self.faces = mesh.faces
        self.vertex_normals = np.asarray(mesh.vertex_normals, np.float32)
        self.scene = rtcore_scene.EmbreeScene()
        self.geometry = TriangleMesh(self.scene, mesh.vertices[mesh.faces].astype(np.float32))

    def cast(self, origins: Tensor, directions: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For rays (..., 3): face index (N,), -1 for a miss; distance (N,); smooth unit normals (N, 3)."""
        starts, ways = (
            np.ascontiguousarray(r.reshape(-1, 3).numpy(), np.float32) for r in (origins, directions)
        )
        hits = self.scene.run(starts, ways, output=1)
        face = hits["primID"].astype(np.int64)
        u, v = hits["u"][:, None], hits["v"][:, None]
        corners = self.vertex_normals[self.faces[np.maximum(face, 0)]]
        normal = corners[:, 0] * (1 - u - v) + corners[:, 1] * u + corners[:, 2] * v
        normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
        normal *= np.where(
            (normal * ways).sum(1, keepdims=True) > 0.3, -1, 1
        )  # the inside of an open surface
        return face, hits["tfar"], normal


def shade(albedo: np.ndarray, normal: np.ndarray, light_turn: float = 0.0) -> np.ndarray:
    """Lambertian colour (N, 3) from albedo and unit normals (N, 3); `light_turn` in radians turns the lights about z."""
    light = np.full(len(normal), AMBIENT, np.float32)
    cos, sin = np.cos(light_turn), np.sin(light_turn)
    for (x, y, z), strength in LIGHTS:
        way = np.array([cos * x - sin * y, sin * x + cos * y, z], np.float32)
        light += strength * np.maximum(normal @ (way / np.linalg.norm(way)), 0)
    return np.clip(albedo * light[:, None], 0, 1)


def render(
    caster: RayCaster, face_albedo: np.ndarray, camera: Cameras, supersample: int = 2, light_turn: float = 0.0
) -> Render:
    """One view (`camera` of length 1) with supersample x supersample rays a pixel; face_albedo (F, 3)."""
    size, k = camera.resolution, supersample
    face, distance, normal = caster.cast(*camera.with_resolution(size * k).rays())
    hit = (face >= 0).astype(np.float32)
    colour = shade(face_albedo[np.maximum(face, 0)].astype(np.float32), normal, light_turn)

    def pooled(values: np.ndarray) -> np.ndarray:
        return (values * hit[:, None]).reshape(size, k, size, k, -1).sum((1, 3))

    count = pooled(np.ones_like(hit)[:, None])
    mean = np.concatenate(
        [pooled(colour), pooled(np.where(hit > 0, distance, 0)[:, None]), pooled(normal)], -1
    ) / np.maximum(count, 1)
    rgba = np.concatenate([mean[..., :3], count / (k * k)], -1)
    length = np.linalg.norm(mean[..., 4:], axis=-1, keepdims=True)
    return Render(rgba, mean[..., 3], mean[..., 4:] / np.maximum(length, 1e-9))
