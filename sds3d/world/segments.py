"""Parts of a mesh, its connected pieces, and their colours in segmentation images."""

import colorsys

import numpy as np
import torch
import trimesh
from torch import Tensor

MOST_PARTS = 255  # further ones are one


def face_parts(mesh: trimesh.Trimesh) -> np.ndarray:
    """The part (F,) uint8 of each face, from 1 on in the order of their areas, the largest first.

    Faces that share an edge are of one part, however many do. Vertices at one place are one, so that creases
    do not divide a part.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    merged = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    merged.merge_vertices(merge_norm=True, merge_tex=True)
    count = len(mesh.faces)
    edges = np.unique(merged.edges_sorted, axis=0, return_inverse=True)[1].ravel()
    pairs = merged.edges_face, count + edges  # faces and edges are the nodes of one graph
    nodes = count + int(edges.max()) + 1
    graph = coo_array((np.ones(len(edges), bool), pairs), shape=(nodes, nodes))
    labels = connected_components(graph, directed=False)[1][:count]
    labels = np.unique(labels, return_inverse=True)[1]
    areas = np.bincount(labels, weights=mesh.area_faces)
    rank = np.empty(len(areas), np.int64)
    rank[np.argsort(-areas, kind="stable")] = np.arange(1, len(areas) + 1)
    return rank[labels].clip(max=MOST_PARTS).astype(np.uint8)


def palette() -> Tensor:
    """Colours (256, 3) uint8 of parts: black for none, then hues 137.5 degrees apart."""
    angle = (3 - 5**0.5) / 2  # the golden angle, in turns
    hues = [colorsys.hsv_to_rgb(part * angle % 1, 0.85, 1.0) for part in range(MOST_PARTS)]
    return (torch.tensor([(0.0, 0.0, 0.0), *hues]) * 255).round().to(torch.uint8)


def segmentation_images(parts: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 of parts (N, H, W) uint8; 0 is the background."""
    return palette()[parts.long()].permute(0, 3, 1, 2).contiguous()
