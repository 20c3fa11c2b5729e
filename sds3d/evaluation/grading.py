"""A mesh against the true one: aligned by rotation about the vertical, scale and translation, then compared as surface and solid.

Only what can be touched from outside counts: the world's meshes are parts pushed into one another, and a result must not be
asked for their hidden faces. Distances are in shares of the truth's bounding-box diagonal.
"""

from dataclasses import dataclass

import numpy as np
import trimesh
from scipy import ndimage
from scipy.spatial import cKDTree

from distill.runtime.errors import UserError

VOXELS = 64  # a side of the cube that solids are compared in
FINE = 150  # points of a shell lie nearer than the diagonal over this: no voxel of a closed surface is missed


@dataclass(frozen=True)
class Surface:
    """Points (N, 3), unit normals (N, 3) and colours (N, 3) in [0, 1], spread evenly over the outside of a mesh.

    `shell` (K, 3) are points over all of its faces, dense enough to hold water.
    """

    points: np.ndarray
    normals: np.ndarray
    colours: np.ndarray
    shell: np.ndarray

    def moved(self, way: "Alignment") -> "Surface":
        """The surface turned, scaled and shifted."""
        return Surface(way.apply(self.points), way.turn(self.normals), self.colours, way.apply(self.shell))


@dataclass(frozen=True)
class Alignment:
    """truth ~ scale * turn(result) + shift; the turn is about z by `yaw` degrees, counter-clockwise from above."""

    yaw: float
    scale: float
    shift: np.ndarray

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 3) of the result in the truth's frame."""
        return self.scale * points @ _turn(self.yaw).T + self.shift

    def turn(self, vectors: np.ndarray) -> np.ndarray:
        """Directions (N, 3) likewise."""
        return vectors @ _turn(self.yaw).T


@dataclass(frozen=True)
class Grade:
    """Chamfer distance (mean of both ways), F-scores at 2 % and 5 % of the diagonal, volume IoU, mean |cos| of normals, mean colour
    error (root mean square over RGB), and how the result had to be turned and scaled."""

    chamfer: float
    f_score_2: float
    f_score_5: float
    volume_iou: float
    normal_consistency: float
    colour_error: float
    yaw: float
    scale: float


def _turn(yaw: float) -> np.ndarray:
    cos, sin = np.cos(np.deg2rad(yaw)), np.sin(np.deg2rad(yaw))
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def solid(shell: np.ndarray, low: np.ndarray, size: float) -> np.ndarray:
    """Occupancy (V, V, V) of the cube from `low` with side `size`: voxels that hold points of a shell, and what they enclose."""
    grid = np.zeros((VOXELS,) * 3, bool)
    index = np.floor((shell - low) / size * VOXELS).astype(int)
    inside = ((index >= 0) & (index < VOXELS)).all(1)
    grid[tuple(index[inside].T)] = True
    return ndimage.binary_fill_holes(grid)


def _shell(mesh: trimesh.Trimesh) -> np.ndarray:
    diagonal = float(np.linalg.norm(np.ptp(mesh.vertices, axis=0)))
    return trimesh.remesh.subdivide_to_size(mesh.vertices, mesh.faces, diagonal / FINE, max_iter=20)[0]


def surface(mesh: trimesh.Trimesh, face_colours: np.ndarray, count: int = 8000, seed: int = 0) -> Surface:
    """`count` points on the outside of a mesh; face_colours (F, 3). Raises `UserError` for a mesh without area or not finite."""
    if len(mesh.faces) == 0 or not np.isfinite(mesh.vertices).all() or mesh.area <= 0:
        raise UserError(f"a mesh of {len(mesh.faces)} faces has no finite surface to grade")
    points, face = trimesh.sample.sample_surface(mesh, 8 * count, seed=seed)
    shell = _shell(mesh)
    low, size = _cube(shell)
    depth = ndimage.distance_transform_edt(solid(shell, low, size))
    index = np.floor((points - low) / size * VOXELS).astype(int)
    outer = np.flatnonzero(depth[tuple(index.T)] <= 1.5)
    chosen = outer[np.linspace(0, len(outer) - 1, min(count, len(outer))).astype(int)]
    return Surface(
        points[chosen],
        mesh.face_normals[face[chosen]],
        np.asarray(face_colours, np.float64)[face[chosen]],
        shell,
    )


def _cube(shell: np.ndarray, margin: float = 0.1) -> tuple[np.ndarray, float]:
    """Corner and side of a cube about points, with a margin a side in shares of their longest extent."""
    extent = float(np.ptp(shell, axis=0).max())
    return _middle(shell) - (0.5 + margin) * extent, (1 + 2 * margin) * extent


def align(result: np.ndarray, truth: np.ndarray, starts: int = 24, iterations: int = 20) -> Alignment:
    """The turn, scale and shift that bring points (N, 3) nearest to the truth's (M, 3), in the mean over both ways.

    Iterated closest points (Besl and McKay 1992) from `starts` equal turns, boxes laid over one another.
    """
    tree = cKDTree(truth)
    best, least = None, np.inf
    few = result[:: max(len(result) // 1000, 1)]
    for yaw in np.arange(starts) * (360.0 / starts):
        found = _descend(few, truth, tree, yaw, iterations)
        moved = found.apply(few)
        error = (
            tree.query(moved)[0].mean() + cKDTree(moved).query(truth[:: max(len(truth) // 1000, 1)])[0].mean()
        )
        if error < least:
            best, least = found, error
    assert best is not None  # at least one start
    return best


def _descend(points: np.ndarray, truth: np.ndarray, tree: cKDTree, yaw: float, iterations: int) -> Alignment:
    turned = points @ _turn(yaw).T
    scale = float(np.ptp(truth, axis=0).max() / np.ptp(turned, axis=0).max())
    current = Alignment(yaw, scale, _middle(truth) - scale * _middle(turned))
    few = truth[:: max(len(truth) // 1000, 1)]
    for _ in range(iterations):
        moved = current.apply(points)
        # both ways, so that a part of the truth cannot be left out, nor the result shrunk into it
        pairs = (
            np.concatenate([points, points[cKDTree(moved).query(few)[1]]]),
            np.concatenate([truth[tree.query(moved)[1]], few]),
        )
        current = _fit(*pairs)
    return current


def _fit(points: np.ndarray, targets: np.ndarray) -> Alignment:
    """Least squares over yaw, scale and shift for matched points (N, 3) (Umeyama 1991, the rotation held to the vertical)."""
    centre, aim = points.mean(0), targets.mean(0)
    p, q = points - centre, targets - aim
    along = (p[:, 0] * q[:, 0] + p[:, 1] * q[:, 1]).sum()
    across = (p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]).sum()
    yaw = float(np.rad2deg(np.arctan2(across, along)))
    scale = float((np.hypot(along, across) + (p[:, 2] * q[:, 2]).sum()) / (p**2).sum())
    return Alignment(yaw, scale, aim - scale * centre @ _turn(yaw).T)


def _middle(points: np.ndarray) -> np.ndarray:
    return (points.min(0) + points.max(0)) / 2


def grade(result: Surface, truth: Surface, aligned: Alignment | None = None) -> Grade:
    """Compare two outsides; the alignment is searched where it is not given."""
    aligned = align(result.points, truth.points) if aligned is None else aligned
    result = result.moved(aligned)
    points, normals = result.points, result.normals
    diagonal = float(np.linalg.norm(np.ptp(truth.points, axis=0)))
    there, nearest = cKDTree(truth.points).query(points)
    back, own = cKDTree(points).query(truth.points)
    there, back = there / diagonal, back / diagonal
    both = np.concatenate(
        [np.abs((normals * truth.normals[nearest]).sum(1)), np.abs((normals[own] * truth.normals).sum(1))]
    )
    colour = np.concatenate([result.colours - truth.colours[nearest], result.colours[own] - truth.colours])
    volumes = [solid(each.shell, *_cube(truth.shell, 0.2)) for each in (result, truth)]
    return Grade(
        chamfer=float((there.mean() + back.mean()) / 2),
        f_score_2=_f_score(there, back, 0.02),
        f_score_5=_f_score(there, back, 0.05),
        volume_iou=float((volumes[0] & volumes[1]).sum() / (volumes[0] | volumes[1]).sum()),
        normal_consistency=float(both.mean()),
        colour_error=float(np.sqrt((colour**2).mean(1)).mean()),
        yaw=(aligned.yaw + 180) % 360 - 180,
        scale=aligned.scale,
    )


def _f_score(there: np.ndarray, back: np.ndarray, reach: float) -> float:
    """Harmonic mean of precision and recall at a distance (Knapitsch et al. 2017)."""
    precision, recall = float((there < reach).mean()), float((back < reach).mean())
    return 2 * precision * recall / max(precision + recall, 1e-12)
