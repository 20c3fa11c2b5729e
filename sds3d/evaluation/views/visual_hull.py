"""The visual hull (Laurentini 1994): the largest solid with given silhouettes from given cameras."""

import numpy as np
import torch
import trimesh
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sds3d.evaluation.grading import SHELL_POINTS, VOXELS, solid
from sds3d.scene.cameras import Cameras
from sds3d.world.shapes import RADIUS

HALF = 1.05 * RADIUS  # of the side of the cube of voxels, around the world's objects


def voxel_centres() -> Tensor:
    """(V^3, 3) of the cube of side 2 `HALF` around the origin, in the order of a grid [x, y, z]."""
    values = (torch.arange(VOXELS) + 0.5) / VOXELS * 2 * HALF - HALF
    return torch.stack(torch.meshgrid(values, values, values, indexing="ij"), -1).flatten(0, 2)


def project(points: Tensor, cameras: Cameras) -> Tensor:
    """Image coordinates (B, N, 2) of points (N, 3): to the right and down, from -1 to 1 over the image."""
    offsets = points[None] - cameras.position[:, None]
    x, y, z = torch.einsum("bij,bni->bnj", cameras.rotation, offsets).unbind(-1)  # right, up, backward
    scale = -z * torch.tan(cameras.fovy / 2)[:, None]
    return torch.stack([x / scale, -y / scale], -1)


def visual_hull(silhouettes: Tensor, cameras: Cameras) -> NDArray[np.bool_]:
    """Occupancy (V, V, V) of the voxels that all silhouettes (B, H, W) bool of B cameras cover."""
    grid = project(voxel_centres(), cameras)
    covered = F.grid_sample(silhouettes.float()[:, None], grid[:, :, None], align_corners=False)
    return (covered[:, 0, :, 0] > 0.5).all(0).view(VOXELS, VOXELS, VOXELS).numpy()


def voxelise(mesh: trimesh.Trimesh) -> NDArray[np.bool_]:
    """Occupancy (V, V, V) of a mesh and its interior, in the cube of `visual_hull`."""
    size = float(np.linalg.norm(np.ptp(mesh.vertices, axis=0))) / SHELL_POINTS
    shell = trimesh.remesh.subdivide_to_size(mesh.vertices, mesh.faces, size, max_iter=20)[0]
    return solid(shell, np.full(3, -HALF), 2 * HALF)


def volume_iou(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Intersection over union of occupancies of one shape; 1 where both are empty."""
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


def best_turn_iou(hull: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """The largest `volume_iou` of a hull over its quarter turns about z."""
    return max(volume_iou(np.rot90(hull, turns, (0, 1)), truth) for turns in range(4))
