"""Lambertian shading by a random point light (DreamFusion, Poole et al. 2022, section 3.2 and appendix A.2).

Albedo alone lets a flat surface carry the picture of a shape; a shaded one without texture has to have it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.runtime.errors import UserError
from distill.runtime.transfer import upload
from sds3d.scene.cameras import Cameras


@dataclass(frozen=True)
class PointLights:
    """White point lights, one for each of N views or rays, with an ambient light."""

    positions: Tensor  # (N, 3) world units
    ambient: float
    diffuse: float
    textureless: bool  # white surfaces

    def shade(self, albedo: Tensor, points: Tensor, normals: Tensor, indices: Tensor) -> Tensor:
        """Colours (M, 3) of points (M, 3) lit by the lights at indices (M,).

        albedo * (ambient + diffuse * max(0, n . l)), for albedo and unit normals (M, 3); a normal of zero
        gets the ambient light alone (DreamFusion, eq. 4).
        """
        direction = F.normalize(self.positions[indices] - points, dim=-1)
        cosine = (normals * direction).sum(-1, keepdim=True).clamp(min=0)
        irradiance = self.ambient + self.diffuse * cosine
        return irradiance.expand_as(albedo) if self.textureless else albedo * irradiance

    def to(self, device: torch.device | str) -> "PointLights":
        """The same lights on another device."""
        return replace(self, positions=upload(self.positions, device))

    def repeat_interleave(self, count: int) -> "PointLights":
        """Each light `count` times: a view's for each of its rays."""
        return replace(self, positions=self.positions.repeat_interleave(count, dim=0))

    def select(self, indices: slice) -> "PointLights":
        """The lights of a slice."""
        return replace(self, positions=self.positions[indices])


@dataclass(frozen=True)
class ShadingOptions:
    """How often training views are shaded, and the light. Raises `UserError` for a value out of range.

    Defaults are those of DreamFusion, whose light is at 0.8 to 1.5 with cameras at 1 to 1.5; here cameras are
    at 3.
    """

    begin: float = 0.2  # fraction of the updates before which views show the albedo
    probability: float = 0.75  # that a step's views are shaded afterwards
    textureless: float = 0.5  # probability that shaded surfaces are white
    ambient: float = 0.1
    diffuse: float = 0.9
    light_distance: tuple[float, float] = (1.8, 3.0)  # world units from the origin
    light_jitter: float = 1.0  # standard deviation of the light about the camera, before it is scaled

    def __post_init__(self) -> None:
        fractions = (self.begin, self.probability, self.textureless)
        if not all(0 <= value <= 1 for value in fractions):
            raise UserError(
                f"shading begin, probability, textureless are {list(fractions)}: fractions in [0, 1] are "
                "expected"
            )
        if min(self.ambient, self.diffuse, self.light_jitter) < 0:
            raise UserError("shading ambient, diffuse and light_jitter must not be negative")
        low, high = self.light_distance
        if not 0 < low <= high:
            raise UserError(
                f"light_distance is [{low}, {high}]: two positive numbers, low then high, expected"
            )

    def sample(self, cameras: Cameras, progress: float, generator: torch.Generator) -> PointLights | None:
        """Lights near cameras (B) on the CPU, or None for a step that shows the albedo.

        One draw decides for all views of a step, as in threestudio.
        """
        if progress < self.begin:
            return None
        shaded, textureless = torch.rand(2, generator=generator).tolist()
        if shaded >= self.probability:
            return None
        jitter = self.light_jitter * torch.randn(cameras.position.shape, generator=generator)
        low, high = self.light_distance
        distance = low + (high - low) * torch.rand(len(cameras), 1, generator=generator)
        positions = F.normalize(cameras.position.cpu() + jitter, dim=-1) * distance
        return PointLights(positions, self.ambient, self.diffuse, textureless < self.textureless)
