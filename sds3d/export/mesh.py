"""A coloured, closed triangle mesh out of a density field.

The isosurface threshold is not a magic number: it is the density at which the volume's silhouettes agree best with the
scene's own renders. Everything runs on log density, which is close to linear across a trained surface, so that
interpolated vertices do not fall onto the grid.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.export.texture import POINTS, ColourField, vertex_coloured
from sds3d.export.turntable import Renderable, render_views
from sds3d.scene.cameras import Cameras, orbit
from sds3d.world.raycast import RayCaster

FLOOR = 1e-2  # density counted as empty: 2 % opacity across the whole box


class DensityField(ColourField, Protocol):
    """What a mesh needs of a field: its colours, and its density alone."""

    def density(self, x: Tensor) -> Tensor:
        """Density (N,) of points x (N, 3)."""


class FieldScene(Renderable, Protocol):
    """A scene that renders itself and shows its field."""

    @property
    def field(self) -> DensityField:
        """The field that the renders integrate."""


@dataclass(frozen=True)
class MeshOptions:
    """How a mesh is taken out of a scene. Raises `UserError` for values no mesh can have."""

    resolution: int = 128  # density samples along each edge of the box
    max_faces: int = 20_000
    views: int = 12  # ring views whose silhouettes are compared; two raised ones are added
    view_resolution: int = 64
    candidates: int = 24  # thresholds tried, then as many again around the best
    min_component: float = (
        0.02  # pieces below this share of the largest one's volume are floaters; 0 keeps all
    )
    smoothing: int = 5  # Taubin iterations

    def __post_init__(self) -> None:
        least = {"resolution": 8, "max_faces": 100, "views": 1, "view_resolution": 8, "candidates": 3}
        for name, value in vars(self).items():
            if value < least.get(name, 0):
                raise UserError(f"mesh {name} is {value}: it must be at least {least.get(name, 0)}")
        if self.min_component > 1:
            raise UserError(
                f"mesh min_component is {self.min_component}: give a share of the largest piece, from 0 to 1"
            )


@dataclass(frozen=True)
class ExtractedMesh:
    """A mesh in scene axes with sRGB vertex colours (8 bit, as the albedo is), and how it came about."""

    mesh: trimesh.Trimesh
    threshold: float  # density of the isosurface
    silhouette_iou: float  # of the final mesh with the scene's opacity > 0.5, mean over the views
    watertight: bool
    dropped: int  # floaters


@torch.no_grad()
def sample_log_density(field: DensityField, resolution: int, device: torch.device) -> Tensor:
    """log(density / FLOOR), at least 0, on the grid [x, y, z] with corners at -1 and 1: (R, R, R) on the CPU.

    Raises `UserError` for a density that is not finite.
    """
    line = torch.linspace(-1, 1, resolution, device=device)
    points = torch.cartesian_prod(line, line, line)
    density = torch.cat([field.density(part).reshape(-1).float().cpu() for part in points.split(POINTS)])
    if not density.isfinite().all():
        raise UserError(
            "the scene's density is not finite: its training diverged, lower the learning rate and run it again"
        )
    return (density.clamp_min(FLOOR) / FLOOR).log().reshape((resolution,) * 3)


def silhouette_cameras(options: MeshOptions) -> Cameras:
    """A ring at 15 degrees, and two cameras at 60 degrees that see into what the ring cannot."""
    azimuth = torch.cat([torch.arange(options.views) * (360 / options.views), torch.tensor([45.0, 225.0])])
    elevation = torch.cat([torch.full((options.views,), 15.0), torch.full((2,), 60.0)])
    distance, fovy = torch.full_like(azimuth, 3.0), torch.full_like(azimuth, 35.0)
    return orbit(azimuth, elevation, distance, fovy, options.view_resolution)


def project_peaks(grid: Tensor, cameras: Cameras) -> Tensor:
    """Largest value along each ray (B, H, W): thresholding it gives the silhouette of that isosurface, no mesh needed."""
    reach, step = math.sqrt(3), 2 / (grid.shape[0] - 1)
    along = torch.arange(-reach, reach, step)[:, None]
    peaks = []
    for origin, direction in zip(*cameras.rays(), strict=True):
        start, way = origin.reshape(-1, 1, 3), direction.reshape(-1, 1, 3)
        points = start + way * (
            along - (start * way).sum(-1, keepdim=True)
        )  # about the point nearest to the centre
        values = F.grid_sample(grid[None, None], points[None, :, :, None].flip(-1), align_corners=True)
        peaks.append(values.reshape(len(start), -1).amax(1).reshape(origin.shape[:2]))
    return torch.stack(peaks)


def mean_iou(first: Tensor, second: Tensor) -> float:
    """Intersection over union of boolean silhouettes (B, H, W), mean over views; 1 where both are empty."""
    union = (first | second).sum((1, 2))
    return torch.where(union > 0, (first & second).sum((1, 2)) / union.clamp_min(1), 1.0).mean().item()


def choose_level(peaks: Tensor, opaque: Tensor, candidates: int) -> float:
    """The level at which `peaks > level` agrees best with `opaque` (both (B, H, W)); the middle where many agree alike."""
    low, high = torch.quantile(peaks[peaks > 0], torch.tensor([0.01, 0.99])).tolist()
    scores: dict[float, float] = {}
    for _ in range(2):
        scores |= {
            level: mean_iou(peaks > level, opaque) for level in np.linspace(low, high, candidates).tolist()
        }
        order = sorted(scores)
        best = order.index(max(order, key=lambda level: scores[level]))
        low, high = order[max(best - 1, 0)], order[min(best + 1, len(order) - 1)]
    first = last = best
    enough = scores[order[best]] - 1e-3
    while first > 0 and scores[order[first - 1]] >= enough:
        first -= 1
    while last + 1 < len(order) and scores[order[last + 1]] >= enough:
        last += 1
    return (order[first] + order[last]) / 2


def clean_volume(grid: np.ndarray, level: float, min_component: float) -> tuple[np.ndarray, int]:
    """The grid without small pieces and with closed cavities filled (nobody sees them), and how many pieces went."""
    from scipy import ndimage

    solid = grid > level
    labels, count = ndimage.label(solid)
    if count == 0:
        raise UserError(
            f"no grid cell is denser than the threshold {FLOOR * math.exp(level):.3g}: raise the mesh resolution"
        )
    sizes = np.bincount(labels.ravel())[1:]
    keep = np.concatenate([[False], sizes >= min_component * sizes.max()])
    kept = keep[labels]
    cleaned = np.where(solid & ~kept, 0, grid)
    cleaned[ndimage.binary_fill_holes(kept) & ~kept] = grid.max()
    return cleaned, int(count - keep.sum())


def march(grid: np.ndarray, level: float) -> trimesh.Trimesh:
    """The isosurface in [-1, 1]^3, closed at the border of the box, normals outward (Lewiner's marching cubes)."""
    from skimage.measure import marching_cubes

    vertices, faces, _, _ = marching_cubes(np.pad(grid, 1), level, gradient_direction="ascent")
    return trimesh.Trimesh((vertices - 1) * (2 / (grid.shape[0] - 1)) - 1, faces)


def _pinched_edges(faces: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Edges (2,) that do not have exactly two faces, each with the rows of its faces."""
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    unique, inverse, count = np.unique(edges, axis=0, return_inverse=True, return_counts=True)
    return [(unique[i], np.flatnonzero(inverse == i) // 3) for i in np.flatnonzero(count != 2)]


def _without_flaps(faces: np.ndarray) -> np.ndarray:
    """The faces without pairs that lie on one another with opposite sides out: nothing is between them."""
    _, inverse, count = np.unique(np.sort(faces, axis=1), axis=0, return_inverse=True, return_counts=True)
    return faces[count[inverse] != 2]


def _wedges(vertices: np.ndarray, edge: np.ndarray, around: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of rows of `around` (faces at the edge) that bound one solid wedge: outside grows with the angle on a face that runs
    along the edge, and falls on one that runs against it. Empty where the faces do not pair up."""
    axis = vertices[edge[1]] - vertices[edge[0]]
    side = np.cross(axis, np.eye(3)[np.abs(axis).argmin()])
    other = around.sum(1) - edge.sum()
    away = vertices[other] - vertices[edge[0]]
    angle = np.arctan2(away @ np.cross(axis, side) / (np.linalg.norm(axis) + 1e-12), away @ side)
    place = (around == edge[0]).argmax(1)
    forward = around[np.arange(len(around)), (place + 1) % 3] == edge[1]
    along, against = np.flatnonzero(forward), list(np.flatnonzero(~forward))
    if len(along) != len(against):
        return []
    pairs = []
    for row in along:
        partner = min(against, key=lambda candidate: (angle[row] - angle[candidate]) % (2 * np.pi))
        against.remove(partner)
        pairs.append((int(row), int(partner)))
    return pairs


def separate_pinches(mesh: trimesh.Trimesh, rounds: int = 8) -> trimesh.Trimesh:
    """The mesh with edges shared by 4, 6, ... faces taken apart (decimation leaves some): each pair of faces that bounds one
    solid wedge gets its own middle vertex, moved a little into the wedge, so that files stay closed after a reload."""
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    for _ in range(rounds):
        faces = _without_flaps(faces)
        taken: set[int] = set()
        points, halves = list(vertices), []
        for edge, rows in _pinched_edges(faces):
            wedges = [] if taken & set(rows.tolist()) else _wedges(vertices, edge, faces[rows])
            for pair in wedges:
                split = faces[rows[list(pair)]]
                middle = vertices[edge].mean(0)
                points.append(middle + 0.05 * (vertices[split.sum(1) - edge.sum()].mean(0) - middle))
                halves += [np.where(split == end, len(points) - 1, split) for end in edge]
            taken |= set(rows.tolist()) if wedges else set()
        if not taken:
            break
        whole = np.setdiff1d(np.arange(len(faces)), list(taken))
        vertices, faces = np.asarray(points), np.concatenate([faces[whole], *halves])
    return trimesh.Trimesh(vertices, faces)


def _fans(mesh: trimesh.Trimesh) -> np.ndarray:
    """Which fan each corner (F, 3) belongs to, numbered from 0: faces about one vertex that are joined by their edges at it."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    faces, beside, ends = np.asarray(mesh.faces), mesh.face_adjacency, mesh.face_adjacency_edges
    # of faces side by side, the corners at each end of their edge belong together
    corners = [
        3 * beside[:, [side]] + (faces[beside[:, side]][:, None] == ends[..., None]).argmax(2)
        for side in (0, 1)
    ]
    joined = coo_matrix((np.ones(ends.size), [corner.ravel() for corner in corners]), shape=(faces.size,) * 2)
    return connected_components(joined, directed=False)[1].reshape(faces.shape)


def is_manifold(mesh: trimesh.Trimesh) -> bool:
    """Whether every edge has exactly two faces and the faces about every vertex are one fan: no parts touch in an edge or a point only."""
    return bool(mesh.is_watertight) and int(_fans(mesh).max()) + 1 == len(np.unique(mesh.faces))


def separate_points(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """The mesh with vertices that several fans share taken apart: each fan gets its own, moved a little towards its faces."""
    fans, faces = _fans(mesh), np.asarray(mesh.faces)
    owner = np.zeros(fans.max() + 1, int)
    owner[fans] = faces
    points = np.asarray(mesh.vertices)[owner]
    shared = np.bincount(owner)[owner] > 1
    middles = np.stack(
        [np.bincount(fans.ravel(), np.repeat(mesh.triangles_center[:, axis], 3)) for axis in range(3)], 1
    )
    middles /= np.bincount(fans.ravel())[:, None]
    points[shared] += 0.05 * (middles - points)[shared]
    return trimesh.Trimesh(points, fans)


def polish(grid: np.ndarray, level: float, options: MeshOptions) -> trimesh.Trimesh:
    """A smoothed, closed mesh within the face budget. Where decimation cannot keep it closed the volume is blurred and the work
    repeated; the undecimated surface is the last resort."""
    from scipy import ndimage

    for blur in (0.0, 0.7, 1.5):
        mesh = march(ndimage.gaussian_filter(grid, blur) if blur else grid, level)
        trimesh.smoothing.filter_taubin(mesh, iterations=options.smoothing)
        if len(mesh.faces) > options.max_faces:  # the margin is for the faces that taking pinches apart adds
            mesh = mesh.simplify_quadric_decimation(face_count=int(0.98 * options.max_faces))
        mesh = separate_points(separate_pinches(mesh))
        if mesh.is_watertight and mesh.volume > 0 and len(mesh.faces) <= options.max_faces:
            return mesh
    return separate_points(separate_pinches(march(grid, level)))


def extract_mesh(scene: FieldScene, options: MeshOptions = MeshOptions()) -> ExtractedMesh:
    """The scene's surface, in a few seconds on two cores.

    Raises `UserError` for an empty scene (no ray reaches opacity 0.5) and for a density that is not finite.
    """
    grid = sample_log_density(scene.field, options.resolution, scene.device)
    cameras = silhouette_cameras(options)
    opaque = render_views(scene, cameras, None).opacity[:, 0] > 0.5
    peaks = project_peaks(grid, cameras)
    if not (peaks.any() and opaque.any()):
        raise UserError(
            f"the scene is empty (largest density {FLOOR * grid.max().exp():.2g}, no ray reaches opacity 0.5): "
            "train it longer or with another seed before taking a mesh out of it"
        )
    level = choose_level(peaks, opaque, options.candidates)
    volume, dropped = clean_volume(grid.numpy(), level, options.min_component)
    mesh = polish(volume, level, options)
    mesh = vertex_coloured(mesh, scene.field, 1 / options.resolution, scene.device)
    seen = torch.from_numpy(RayCaster(mesh).cast(*cameras.rays())[0] >= 0).reshape(opaque.shape)
    return ExtractedMesh(
        mesh, FLOOR * math.exp(level), mean_iou(seen, opaque), bool(mesh.is_watertight), dropped
    )
