"""Text to 3-D under a mesh's control: the teacher sees, through an adapter, the depth or silhouette of a coarse mesh from each camera."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import trimesh

from distill.control.adapter import Control, ControlledUnet, controlled, load_adapter
from distill.control.conditions import as_input
from distill.runtime.errors import UserError
from distill.teacher.latent import Teacher
from sds3d.export.files import TO_FILE, read_scene
from sds3d.scene.cameras import Cameras
from sds3d.world.conditions import CONDITIONS, mesh_pictures
from sds3d.world.shapes import RADIUS

MOST_FACES = 1_000_000


@dataclass(frozen=True)
class MeshControlOptions:
    """A mesh file, the adapter (by name or folder) that sees it, its weight, and the share of the denoising it acts in, from pure noise."""

    mesh: str
    adapter: str = "depth"
    condition: Literal["", "silhouette", "depth", "normals"] = ""  # where the adapter's folder does not say
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0


def coarse_mesh(path: Path | str) -> trimesh.Trimesh:
    """A user's mesh in scene axes, centred and scaled as the world's are. Raises `UserError`, one sentence, for what cannot be shown."""
    parts = read_scene(path, process=False)  # which would drop what is not finite
    if not all(np.isfinite(part.vertices).all() for part in parts.geometry.values()):
        raise UserError(f"{path} has vertices that are not finite numbers: repair the mesh")
    mesh = parts.to_mesh()
    mesh.apply_transform(TO_FILE.T)
    if not len(mesh.faces):
        raise UserError(
            f"{path} holds no faces: a mesh with a surface is expected (points and lines show nothing)"
        )
    if len(mesh.faces) > MOST_FACES:
        raise UserError(
            f"{path} has {len(mesh.faces):,} faces: a coarse mesh of at most {MOST_FACES:,} is expected, decimate it"
        )
    mesh.apply_translation(-mesh.bounds.mean(axis=0))
    reach = float(np.linalg.norm(mesh.vertices, axis=1).max())
    if reach <= 0 or mesh.area <= 0:
        raise UserError(f"{path} has no extent: all of its vertices lie in one point or on one line")
    mesh.apply_scale(RADIUS / reach)
    return mesh


class MeshControl:
    """The mesh, and the teacher seen through its adapter; `look` turns what it shows to the cameras of a step."""

    def __init__(self, teacher: Teacher, options: MeshControlOptions) -> None:
        """Raises `UserError` for a mesh or an adapter that cannot serve."""
        self.mesh = coarse_mesh(options.mesh)
        adapter, told = load_adapter(options.adapter, teacher.device)
        self.condition = options.condition or told
        if self.condition not in CONDITIONS:
            known = ", ".join(CONDITIONS)
            raise UserError(
                f"the adapter {options.adapter} takes {told or 'something unknown'}: of a mesh there are {known}"
            )
        side = teacher.resolution
        self.control = Control(
            adapter, torch.zeros(1, 3, side, side), options.weight, options.start, options.end
        )
        self.teacher = controlled(teacher, [self.control])

    def look(self, cameras: Cameras) -> None:
        """Show the teacher the mesh from cameras (B), the order of its next batches."""
        pictures = as_input(mesh_pictures(self.mesh, self.condition, cameras))
        assert isinstance(self.teacher.score.unet, ControlledUnet)
        self.teacher.score.unet.controls = [replace(self.control, pictures=pictures.to(self.teacher.device))]
