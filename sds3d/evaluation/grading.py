"""A mesh against the true one: aligned by yaw, scale and translation, then compared as surface and solid.

Only the outer surface counts: the world's meshes are overlapping parts, and a result has none of their hidden
faces. Distances are fractions of the diagonal of the truth's bounding box.
"""

from dataclasses import dataclass

import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from distill.runtime.errors import UserError
from sds3d.world.raycast import Albedo

VOXELS = 64  # a side of the cube in which solids are compared
SHELL_POINTS = 150  # of a shell along the diagonal, at least: no voxel of a closed surface stays empty
INITIAL_YAWS, ITERATIONS = 24, 20  # of the alignment
ALIGNED_POINTS = 1000  # points of either side that the alignment uses

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Surface:
    """A uniform sample of the outside of a mesh."""

    points: Array  # (N, 3)
    normals: Array  # (N, 3) unit
    colours: Array  # (N, 3) in [0, 1]
    shell: Array  # (K, 3) points over all faces, dense enough to enclose a volume of voxels

    def transformed(self, alignment: "Alignment") -> "Surface":
        """The surface in the truth's frame."""
        return Surface(
            alignment.apply(self.points),
            alignment.rotate(self.normals),
            self.colours,
            alignment.apply(self.shell),
        )


@dataclass(frozen=True)
class Alignment:
    """truth ~ scale * R result + translation, R a rotation about z by `yaw` degrees."""

    yaw: float
    scale: float
    translation: Array

    def apply(self, points: Array) -> Array:
        """Points (N, 3) of the result in the truth's frame."""
        return self.scale * points @ _rotation(self.yaw).T + self.translation

    def rotate(self, vectors: Array) -> Array:
        """Directions (N, 3) likewise."""
        return vectors @ _rotation(self.yaw).T


@dataclass(frozen=True)
class Grade:
    """A result against the truth."""

    chamfer: float  # mean of both directions
    f_score_2: float  # at 2 % of the diagonal
    f_score_5: float
    volume_iou: float
    normal_consistency: float  # mean |cos|
    colour_error: float  # root mean square over RGB, mean over points
    yaw: float  # degrees, in [-180, 180); of the alignment, as is scale
    scale: float


def _rotation(yaw: float) -> Array:
    cos, sin = np.cos(np.deg2rad(yaw)), np.sin(np.deg2rad(yaw))
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def solid(shell: Array, low: Array, size: float) -> NDArray[np.bool_]:
    """Occupancy (V, V, V) of the cube with corner `low`, side `size`: a shell's voxels and its interior."""
    grid = np.zeros((VOXELS,) * 3, bool)
    voxels = np.floor((shell - low) / size * VOXELS).astype(int)
    inside = ((voxels >= 0) & (voxels < VOXELS)).all(1)
    grid[tuple(voxels[inside].T)] = True
    return ndimage.binary_fill_holes(grid)


def surface(mesh: trimesh.Trimesh, colours: Albedo, count: int = 8000, seed: int = 0) -> Surface:
    """`count` points on the outside of a mesh, whose colours are those of the faces (F, 3), or a function of
    points (N, 3) and faces (N,), which solid textures need. Raises `UserError` without area.
    """
    if len(mesh.faces) == 0 or not np.isfinite(mesh.vertices).all() or mesh.area <= 0:
        raise UserError(f"a mesh of {len(mesh.faces)} faces has no finite surface to grade")
    points, faces = trimesh.sample.sample_surface(mesh, 8 * count, seed=seed)
    diagonal = float(np.linalg.norm(np.ptp(mesh.vertices, axis=0)))
    shell = trimesh.remesh.subdivide_to_size(mesh.vertices, mesh.faces, diagonal / SHELL_POINTS, max_iter=20)[
        0
    ]

    # A point is outside if it lies within 1.5 voxels of the empty space around the filled solid.
    low, size = _cube(shell)
    depth = ndimage.distance_transform_edt(solid(shell, low, size))
    voxels = np.floor((points - low) / size * VOXELS).astype(int)
    outer = np.flatnonzero(depth[tuple(voxels.T)] <= 1.5)
    chosen = outer[np.linspace(0, len(outer) - 1, min(count, len(outer))).astype(int)]
    points, faces = points[chosen], faces[chosen]
    values = colours[faces] if isinstance(colours, np.ndarray) else colours(points, faces)
    return Surface(points, mesh.face_normals[faces], np.asarray(values, np.float64), shell)


def _cube(shell: Array, margin: float = 0.1) -> tuple[Array, float]:
    """Corner and side of a cube around points, with a margin on each side as a fraction of their extent."""
    extent = float(np.ptp(shell, axis=0).max())
    return _centre(shell) - (0.5 + margin) * extent, (1 + 2 * margin) * extent


def align(result: Array, truth: Array) -> Alignment:
    """The alignment of points (N, 3) with the truth's (M, 3) of least mean distance in both directions.

    Iterated closest points (Besl and McKay 1992) from equally spaced yaws with matching bounding boxes.
    """
    tree = cKDTree(truth)
    points, targets = (each[:: max(len(each) // ALIGNED_POINTS, 1)] for each in (result, truth))
    candidates = []
    for yaw in np.arange(INITIAL_YAWS) * (360.0 / INITIAL_YAWS):
        alignment = _closest_points(points, truth, targets, tree, yaw)
        aligned = alignment.apply(points)
        error = tree.query(aligned)[0].mean() + cKDTree(aligned).query(targets)[0].mean()
        candidates.append((error, alignment))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _closest_points(points: Array, truth: Array, targets: Array, tree: cKDTree, yaw: float) -> Alignment:
    """Iterated closest points from one yaw; `targets` are a subset of the truth."""
    rotated = points @ _rotation(yaw).T
    scale = float(np.ptp(truth, axis=0).max() / np.ptp(rotated, axis=0).max())
    alignment = Alignment(yaw, scale, _centre(truth) - scale * _centre(rotated))
    for _ in range(ITERATIONS):
        aligned = alignment.apply(points)
        # Pairs in both directions: no part of the truth is ignored, and the result cannot shrink into one.
        sources = np.concatenate([points, points[cKDTree(aligned).query(targets)[1]]])
        alignment = _fit(sources, np.concatenate([truth[tree.query(aligned)[1]], targets]))
    return alignment


def _fit(points: Array, targets: Array) -> Alignment:
    """Least squares for matched points (N, 3) (Umeyama 1991, with rotations about z only)."""
    centre, target_centre = points.mean(0), targets.mean(0)
    p, q = points - centre, targets - target_centre
    dot = (p[:, 0] * q[:, 0] + p[:, 1] * q[:, 1]).sum()
    cross = (p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]).sum()
    yaw = float(np.rad2deg(np.arctan2(cross, dot)))
    scale = float((np.hypot(dot, cross) + (p[:, 2] * q[:, 2]).sum()) / (p**2).sum())
    return Alignment(yaw, scale, target_centre - scale * centre @ _rotation(yaw).T)


def _centre(points: Array) -> Array:
    return (points.min(0) + points.max(0)) / 2


def grade(result: Surface, truth: Surface, alignment: Alignment | None = None) -> Grade:
    """Compare two surfaces; the alignment is searched where it is not given."""
    alignment = align(result.points, truth.points) if alignment is None else alignment
    result = result.transformed(alignment)
    diagonal = float(np.linalg.norm(np.ptp(truth.points, axis=0)))
    to_truth, nearest_truth = cKDTree(truth.points).query(result.points)
    to_result, nearest_result = cKDTree(result.points).query(truth.points)
    to_truth, to_result = to_truth / diagonal, to_result / diagonal

    cosines = np.concatenate(
        [
            np.abs((result.normals * truth.normals[nearest_truth]).sum(1)),
            np.abs((result.normals[nearest_result] * truth.normals).sum(1)),
        ]
    )
    colours = np.concatenate(
        [result.colours - truth.colours[nearest_truth], result.colours[nearest_result] - truth.colours]
    )
    volumes = [solid(each.shell, *_cube(truth.shell, 0.2)) for each in (result, truth)]
    return Grade(
        chamfer=float((to_truth.mean() + to_result.mean()) / 2),
        f_score_2=_f_score(to_truth, to_result, 0.02),
        f_score_5=_f_score(to_truth, to_result, 0.05),
        volume_iou=float((volumes[0] & volumes[1]).sum() / (volumes[0] | volumes[1]).sum()),
        normal_consistency=float(cosines.mean()),
        colour_error=float(np.sqrt((colours**2).mean(1)).mean()),
        yaw=(alignment.yaw + 180) % 360 - 180,
        scale=alignment.scale,
    )


def _f_score(to_truth: Array, to_result: Array, threshold: float) -> float:
    """Harmonic mean of precision and recall at a distance (Knapitsch et al. 2017)."""
    precision, recall = float((to_truth < threshold).mean()), float((to_result < threshold).mean())
    return 2 * precision * recall / max(precision + recall, 1e-12)
