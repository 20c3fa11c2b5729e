"""Text-to-3D conditioned on a coarse mesh: on its depth, silhouette, normals or parts from each camera."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import trimesh

from distill.control.adapter import controlled, load_adapter
from distill.control.conditions import adapter_input
from distill.control.network import Control, ControlledNetwork
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload
from distill.teacher.pipeline import LatentTeacher
from sds3d.export.files import TO_FILE, read_scene
from sds3d.scene.cameras import Cameras
from sds3d.world.conditions import CONDITIONS, mesh_condition_images
from sds3d.world.raycast import RayCaster
from sds3d.world.shapes import RADIUS

MOST_FACES = 1_000_000


@dataclass(frozen=True)
class MeshControlOptions:
    """A mesh file, and the adapter that is conditioned on its renders."""

    mesh: str
    adapter: str = "depth"  # a shipped name, or a folder
    # needed where the adapter's folder has none
    condition: Literal["", "silhouette", "depth", "normals", "segmentation"] = ""
    weight: float = 1.0
    start: float = 0.0  # it acts in this part of the denoising; 0 is pure noise
    end: float = 1.0


def coarse_mesh(path: Path | str) -> trimesh.Trimesh:
    """A user's mesh in scene axes, centred and scaled as the world's are.

    Raises `UserError` for a file without a finite surface, or with more than `MOST_FACES` faces.
    """
    parts = read_scene(path, process=False)  # processing would drop values that are not finite
    if not all(np.isfinite(part.vertices).all() for part in parts.geometry.values()):
        raise UserError(f"{path} has vertices that are not finite numbers: repair the mesh")
    mesh = parts.to_mesh()
    mesh.apply_transform(TO_FILE.T)
    if not len(mesh.faces):
        raise UserError(
            f"{path} holds no faces: a mesh with a surface is expected (points and lines cannot be rendered)"
        )
    if len(mesh.faces) > MOST_FACES:
        raise UserError(
            f"{path} has {len(mesh.faces):,} faces: a coarse mesh of at most {MOST_FACES:,} is expected, "
            "decimate it"
        )
    mesh.apply_translation(-mesh.bounds.mean(axis=0))
    radius = float(np.linalg.norm(mesh.vertices, axis=1).max())
    centred = mesh.vertices - mesh.vertices.mean(axis=0)
    if np.linalg.matrix_rank(centred, tol=1e-6 * radius * len(centred) ** 0.5) < 3:
        raise UserError(f"{path} is flat: all of its vertices lie in one plane, on one line or in one point")
    mesh.apply_scale(RADIUS / radius)
    return mesh


class MeshControl:
    """A mesh, and the teacher conditioned on it; `set_cameras` renders the mesh for the next batches."""

    def __init__(self, teacher: LatentTeacher, options: MeshControlOptions) -> None:
        """Raises `UserError` for a mesh or an adapter that cannot be used."""
        self.caster = RayCaster(coarse_mesh(options.mesh))
        adapter, trained_on = load_adapter(options.adapter, teacher)
        self.condition = options.condition or trained_on
        if self.condition not in CONDITIONS:
            raise UserError(
                f"the adapter {options.adapter} takes {trained_on or 'an unknown condition'}: "
                f"of a mesh there are {', '.join(CONDITIONS)}"
            )
        side = teacher.resolution
        self.control = Control(
            adapter, torch.zeros(1, 3, side, side), options.weight, options.start, options.end
        )
        self.teacher = controlled(teacher, [self.control])

    def set_cameras(self, cameras: Cameras) -> None:
        """Condition the teacher on the mesh from cameras (B), in the order of its next batches."""
        renders = mesh_condition_images(self.caster, self.condition, cameras)
        images = adapter_input(upload(renders, self.teacher.device))
        network = self.teacher.denoiser.network
        assert isinstance(network, ControlledNetwork)
        network.controls = [replace(self.control, images=images)]
