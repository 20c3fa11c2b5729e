"""A coloured, closed triangle mesh from a density field.

The threshold of the isosurface is the density at which the volume's silhouettes agree best with the scene's
own renders. All computations are on log density, which is close to linear across a trained surface, so that
interpolated vertices do not snap to the grid.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.export.texture import vertex_coloured
from sds3d.export.turntable import render_views
from sds3d.scene.cameras import Cameras, orbit
from sds3d.scene.protocol import ExtractedMesh, MeshOptions, Scene3D
from sds3d.world.raycast import RayCaster

EMPTY_DENSITY = 1e-2  # 2 % opacity across the whole box
CHUNK = 1 << 17  # evaluations of density at once, which bounds the memory

Density = Callable[[Tensor], Tensor]  # points (N, 3) in [-1, 1]^3 to densities (N,) per world unit


@torch.no_grad()
def sample_log_density(density: Density, resolution: int, device: torch.device) -> Tensor:
    """log(density / EMPTY_DENSITY), at least 0, on a grid [x, y, z] with corners at -1 and 1.

    Returns (R, R, R) on the CPU.

    Raises `UserError` for a density that is not finite.
    """
    line = torch.linspace(-1, 1, resolution, device=device)
    points = torch.cartesian_prod(line, line, line)
    values = torch.cat([density(chunk).reshape(-1).float().cpu() for chunk in points.split(CHUNK)])
    if not values.isfinite().all():
        raise UserError("the scene's density is not finite, its training diverged: lower the learning rate")
    return (values.clamp_min(EMPTY_DENSITY) / EMPTY_DENSITY).log().reshape((resolution,) * 3)


def silhouette_cameras(options: MeshOptions) -> Cameras:
    """A ring at 15 degrees, and two cameras at 60 degrees that see into cavities."""
    azimuth = torch.cat([torch.arange(options.views) * (360 / options.views), torch.tensor([45.0, 225.0])])
    elevation = torch.cat([torch.full((options.views,), 15.0), torch.full((2,), 60.0)])
    distance, fovy = torch.full_like(azimuth, 3.0), torch.full_like(azimuth, 35.0)
    return orbit(azimuth, elevation, distance, fovy, options.view_resolution)


def project_peaks(grid: Tensor, cameras: Cameras) -> Tensor:
    """The largest value of a grid (R, R, R) along each ray, (B, H, W).

    Thresholded, it is the silhouette of the isosurface at that level.
    """
    radius, step = math.sqrt(3), 2 / (grid.shape[0] - 1)
    offsets = torch.arange(-radius, radius, step)[:, None]
    peaks = []
    for origins, directions in zip(*cameras.rays(), strict=True):
        origin, direction = origins.reshape(-1, 1, 3), directions.reshape(-1, 1, 3)
        nearest = (origin * direction).sum(-1, keepdim=True)  # minus the distance to the point nearest to 0
        points = origin + direction * (offsets - nearest)
        values = F.grid_sample(grid[None, None], points[None, :, :, None].flip(-1), align_corners=True)
        peaks.append(values.reshape(len(origin), -1).amax(1).reshape(origins.shape[:2]))
    return torch.stack(peaks)


def mean_iou(first: Tensor, second: Tensor) -> float:
    """Intersection over union of boolean silhouettes (B, H, W), mean over views; 1 where both are empty."""
    union = (first | second).sum((1, 2))
    return torch.where(union > 0, (first & second).sum((1, 2)) / union.clamp_min(1), 1.0).mean().item()


def silhouettes(mesh: trimesh.Trimesh, cameras: Cameras) -> Tensor:
    """Which pixels of each view (B, H, W) a mesh covers."""
    face, _, _ = RayCaster(mesh).cast(*cameras.rays())
    return torch.from_numpy(face >= 0).reshape(len(cameras), cameras.resolution, cameras.resolution)


def choose_level(peaks: Tensor, opaque: Tensor, candidates: int) -> float:
    """The level at which `peaks > level` agrees best with `opaque` (both (B, H, W)).

    The middle of the range of levels whose IoU is within 1e-3 of the best.
    """
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
    threshold = scores[order[best]] - 1e-3
    while first > 0 and scores[order[first - 1]] >= threshold:
        first -= 1
    while last + 1 < len(order) and scores[order[last + 1]] >= threshold:
        last += 1
    return (order[first] + order[last]) / 2


def clean_volume(grid: np.ndarray, level: float, min_component: float) -> tuple[np.ndarray, int]:
    """The grid without small components and with its closed, invisible cavities filled; the number removed.

    Raises `UserError` where nothing exceeds the level.
    """
    from scipy import ndimage

    solid = grid > level
    labels, count = ndimage.label(solid)
    if count == 0:
        density = EMPTY_DENSITY * math.exp(level)
        raise UserError(f"no grid cell is denser than the threshold {density:.3g}: raise the mesh resolution")
    sizes = np.bincount(labels.ravel())[1:]
    large = np.concatenate([[False], sizes >= min_component * sizes.max()])
    mask = large[labels]
    cleaned = np.where(solid & ~mask, 0, grid)
    cleaned[ndimage.binary_fill_holes(mask) & ~mask] = grid.max()
    return cleaned, int(count - large.sum())


def isosurface(grid: np.ndarray, level: float) -> trimesh.Trimesh:
    """The isosurface in [-1, 1]^3, closed at the border, normals outwards (Lewiner's marching cubes)."""
    from skimage.measure import marching_cubes

    vertices, faces, _, _ = marching_cubes(np.pad(grid, 1), level, gradient_direction="ascent")
    return trimesh.Trimesh((vertices - 1) * (2 / (grid.shape[0] - 1)) - 1, faces)


def _pinched_edges(faces: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Edges (2,) that do not have exactly two faces, each with the indices of its faces."""
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    unique, inverse, count = np.unique(edges, axis=0, return_inverse=True, return_counts=True)
    return [(unique[i], np.flatnonzero(inverse == i) // 3) for i in np.flatnonzero(count != 2)]


def _without_flaps(faces: np.ndarray) -> np.ndarray:
    """The faces without pairs of coincident, opposite faces, which enclose nothing."""
    _, inverse, count = np.unique(np.sort(faces, axis=1), axis=0, return_inverse=True, return_counts=True)
    return faces[count[inverse] != 2]


def _wedges(vertices: np.ndarray, edge: np.ndarray, faces: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of indices of `faces`, all at one edge, that bound one solid wedge; empty if they do not pair up.

    About the edge, the outside lies at larger angles for a face that traverses the edge forward, and at
    smaller ones for a face that traverses it backward.
    """
    axis = vertices[edge[1]] - vertices[edge[0]]
    side = np.cross(axis, np.eye(3)[np.abs(axis).argmin()])
    opposite = faces.sum(1) - edge.sum()
    offset = vertices[opposite] - vertices[edge[0]]
    angle = np.arctan2(offset @ np.cross(axis, side) / (np.linalg.norm(axis) + 1e-12), offset @ side)
    corner = (faces == edge[0]).argmax(1)
    forward = faces[np.arange(len(faces)), (corner + 1) % 3] == edge[1]
    backward_faces = list(np.flatnonzero(~forward))
    if 2 * len(backward_faces) != len(faces):
        return []
    pairs = []
    for face in np.flatnonzero(forward):
        partner = min(backward_faces, key=lambda other: (angle[face] - angle[other]) % (2 * np.pi))
        backward_faces.remove(partner)
        pairs.append((int(face), int(partner)))
    return pairs


def split_edges(mesh: trimesh.Trimesh, rounds: int = 8) -> trimesh.Trimesh:
    """The mesh with edges that 4, 6, ... faces share (as decimation leaves some) split apart.

    Each pair of faces that bounds one solid wedge gets its own middle vertex, moved slightly into the wedge,
    so that files remain watertight when vertices are merged on loading.
    """
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    for _ in range(rounds):
        faces = _without_flaps(faces)
        replaced: set[int] = set()
        points, halves = list(vertices), []
        for edge, indices in _pinched_edges(faces):
            wedges = [] if replaced & set(indices.tolist()) else _wedges(vertices, edge, faces[indices])
            for pair in wedges:
                wedge = faces[indices[list(pair)]]
                middle = vertices[edge].mean(0)
                points.append(middle + 0.05 * (vertices[wedge.sum(1) - edge.sum()].mean(0) - middle))
                halves += [np.where(wedge == end, len(points) - 1, wedge) for end in edge]
            replaced |= set(indices.tolist()) if wedges else set()
        if not replaced:
            break
        remaining = np.setdiff1d(np.arange(len(faces)), list(replaced))
        vertices, faces = np.asarray(points), np.concatenate([faces[remaining], *halves])
    return trimesh.Trimesh(vertices, faces)


def _fans(mesh: trimesh.Trimesh) -> np.ndarray:
    """The fan, numbered from 0, of each corner (F, 3): faces at one vertex, connected by edges at it."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    faces, adjacent, ends = np.asarray(mesh.faces), mesh.face_adjacency, mesh.face_adjacency_edges
    # Of adjacent faces, the corners at each end of the shared edge are in one fan.
    corners = [
        3 * adjacent[:, [side]] + (faces[adjacent[:, side]][:, None] == ends[..., None]).argmax(2)
        for side in (0, 1)
    ]
    graph = coo_matrix((np.ones(ends.size), [corner.ravel() for corner in corners]), shape=(faces.size,) * 2)
    return connected_components(graph, directed=False)[1].reshape(faces.shape)


def is_manifold(mesh: trimesh.Trimesh) -> bool:
    """Whether every edge has exactly two faces, and the faces at every vertex form a single fan."""
    return bool(mesh.is_watertight) and int(_fans(mesh).max()) + 1 == len(np.unique(mesh.faces))


def split_vertices(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """The mesh with a vertex for each fan; where fans shared one, moved slightly towards their own faces."""
    fans, faces = _fans(mesh), np.asarray(mesh.faces)
    owner = np.zeros(fans.max() + 1, int)
    owner[fans] = faces
    points = np.asarray(mesh.vertices)[owner]
    shared = np.bincount(owner)[owner] > 1
    centres = np.repeat(mesh.triangles_center, 3, axis=0)
    sums = np.stack([np.bincount(fans.ravel(), centres[:, axis]) for axis in range(3)], 1)
    middles = sums / np.bincount(fans.ravel())[:, None]
    points[shared] += 0.05 * (middles - points)[shared]
    return trimesh.Trimesh(points, fans)


def polish(grid: np.ndarray, level: float, options: MeshOptions) -> trimesh.Trimesh:
    """A smoothed, closed mesh of at most `max_faces`.

    Where decimation opens the mesh, the grid is blurred and the extraction repeated; the last resort is the
    undecimated surface.
    """
    from scipy import ndimage

    for blur in (0.0, 0.7, 1.5):
        mesh = isosurface(ndimage.gaussian_filter(grid, blur) if blur else grid, level)
        trimesh.smoothing.filter_taubin(mesh, iterations=options.smoothing)
        if len(mesh.faces) > options.max_faces:  # 2 % less, for the faces that splitting edges adds
            mesh = mesh.simplify_quadric_decimation(face_count=int(0.98 * options.max_faces))
        mesh = split_vertices(split_edges(mesh))
        if mesh.is_watertight and mesh.volume > 0 and len(mesh.faces) <= options.max_faces:
            return mesh
    return split_vertices(split_edges(isosurface(grid, level)))


def extract_isosurface(scene: Scene3D, density: Density, options: MeshOptions) -> ExtractedMesh:
    """The surface of a scene given by a density on its device, in a few seconds on two cores.

    Raises `UserError` for an empty scene (no ray reaches opacity 0.5) and for a density that is not finite.
    """
    grid = sample_log_density(density, options.resolution, scene.device)
    cameras = silhouette_cameras(options)
    opaque = render_views(scene, cameras, None).opacity[:, 0] > 0.5
    peaks = project_peaks(grid, cameras)
    if not (peaks.any() and opaque.any()):
        raise UserError(
            f"the scene is empty (largest density {EMPTY_DENSITY * grid.max().exp():.2g}, "
            "no ray reaches opacity 0.5): train it longer or with another seed"
        )

    level = choose_level(peaks, opaque, options.candidates)
    volume, floaters = clean_volume(grid.numpy(), level, options.min_component)
    mesh = polish(volume, level, options)
    mesh = vertex_coloured(mesh, partial(scene.surface_colours, spacing=1 / options.resolution))
    iou = mean_iou(silhouettes(mesh, cameras), opaque)
    return ExtractedMesh(mesh, EMPTY_DENSITY * math.exp(level), iou, bool(mesh.is_watertight), floaters)
