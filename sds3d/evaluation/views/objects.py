"""Objects whose views are known: those of the world by name, and assemblies that no data set has."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.scene.cameras import Cameras
from sds3d.world.assemblies import UNSEEN, make_assembly
from sds3d.world.raycast import Albedo, RayCaster, render
from sds3d.world.shapes import COLOURS, OBJECTS, Shape, make_shape, noun_phrase


@final
@dataclass(frozen=True)
class KnownObject:
    """An object and how the world renders it; the caption of one without a name is empty."""

    name: str
    caption: str
    shape: Shape
    colour: np.ndarray  # (3,) of the faces without an accent

    @cached_property
    def caster(self) -> RayCaster:
        """The acceleration structure of its mesh."""
        return RayCaster(self.shape.mesh)

    def render(self, cameras: Cameras) -> Tensor:
        """Views (B, 4, H, W) in [0, 1], colour not premultiplied, as in the world's images."""
        albedo: Albedo = self.shape.albedo(self.colour)
        if self.shape.patterns:
            albedo = self._pattern_albedo
        views = [render(self.caster, albedo, camera).rgba for camera in cameras.split(1)]
        return torch.from_numpy(np.stack(views)).float().permute(0, 3, 1, 2)

    def _pattern_albedo(self, points: np.ndarray, faces: np.ndarray) -> np.ndarray:
        return self.shape.colours_at(points, faces, self.colour)


def composite(views: Tensor, levels: Tensor | float) -> Tensor:
    """Views (B, 4, H, W) over grey levels (B,) or one: (B, 3, H, W)."""
    level = torch.as_tensor(levels).expand(len(views))[:, None, None, None]
    colour, alpha = views[:, :3], views[:, 3:]
    return colour * alpha + level * (1 - alpha)


def silhouettes(views: Tensor) -> Tensor:
    """The pixels (B, H, W) bool of views (B, 4, H, W) that are covered at least by half."""
    return views[:, 3] >= 0.5


def named_objects(names: Sequence[str]) -> list[KnownObject]:
    """Objects of the world, each in one colour, in turn. Raises `UserError` for an unknown name."""
    unknown = [name for name in names if name not in OBJECTS]
    if unknown:
        raise UserError(
            f"the world has no object {', '.join(unknown)}: expected some of {', '.join(OBJECTS)}"
        )
    colours = list(COLOURS)
    chosen = [(name, colours[OBJECTS.index(name) % len(colours)]) for name in names]
    return [
        KnownObject(name, noun_phrase(colour, name), make_shape(name), np.array(COLOURS[colour]))
        for name, colour in chosen
    ]


def unseen_objects(count: int) -> list[KnownObject]:
    """The first assemblies that are held out of every data set, at most 30."""
    shapes = [make_assembly(seed) for seed in UNSEEN[:count]]
    return [KnownObject(shape.name, "", shape, np.zeros(3)) for shape in shapes]
