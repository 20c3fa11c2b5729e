"""Pinhole cameras on a sphere around the object.

Convention of the world's renders and of scenes: z is up; a camera at azimuth 0 lies on +x and faces the
object's front; azimuth grows towards +y (counter-clockwise from above). Image row 0 is the top.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.runtime.errors import UserError
from distill.runtime.transfer import upload_all


@dataclass(frozen=True)
class CameraOptions:
    """Ranges of uniformly distributed random cameras. Angles in degrees, lengths in world units.

    Raises `UserError` for an empty range or an angle out of bounds.
    """

    elevation: tuple[float, float] = (-10.0, 80.0)
    azimuth: tuple[float, float] = (-180.0, 180.0)
    distance: tuple[float, float] = (2.75, 3.25)  # those of the world's own cameras
    fovy: tuple[float, float] = (35.0, 35.0)
    centre_jitter: float = 0.05  # half-width of the uniform offset of the camera's target

    def __post_init__(self) -> None:
        limits = {"elevation": (-89, 89), "azimuth": (-360, 360), "distance": (1e-3, 1e3), "fovy": (1, 170)}
        for name, (minimum, maximum) in limits.items():
            low, high = vars(self)[name]
            if not minimum <= low <= high <= maximum:
                raise UserError(
                    f"camera {name} is [{low}, {high}]: "
                    f"give two numbers, low then high, within [{minimum}, {maximum}]"
                )
        if not 0 <= self.centre_jitter <= 1e3:
            raise UserError(
                f"camera centre_jitter is {self.centre_jitter}: "
                "a half-width of 0 or more world units is expected"
            )


@dataclass(frozen=True)
class Cameras:
    """A batch of B square pinhole cameras.

    The columns of a rotation are right, up and backward: a camera looks along minus the third.
    """

    position: Tensor  # (B, 3)
    azimuth: Tensor  # (B,) degrees, of the camera relative to its target
    elevation: Tensor  # (B,) degrees, likewise
    rotation: Tensor  # (B, 3, 3)
    fovy: Tensor  # (B,) radians
    resolution: int  # pixels a side

    def __len__(self) -> int:
        return len(self.position)

    def _apply(self, function: Callable[[Tensor], Tensor]) -> "Cameras":
        tensors: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if name != "resolution"
        }
        return replace(self, **tensors)

    def to(self, device: torch.device | str) -> "Cameras":
        """The same cameras on another device."""
        position, azimuth, elevation, rotation, fovy = upload_all(
            [self.position, self.azimuth, self.elevation, self.rotation, self.fovy], device
        )
        return Cameras(position, azimuth, elevation, rotation, fovy, self.resolution)

    def with_resolution(self, resolution: int) -> "Cameras":
        """The same cameras at another resolution."""
        return replace(self, resolution=resolution)

    def select(self, indices: Tensor | slice) -> "Cameras":
        """The cameras at indices (K,), or of a slice."""
        return self._apply(lambda value: value[indices])

    def split(self, size: int) -> Iterator["Cameras"]:
        """The cameras in order, `size` at a time."""
        return (self.select(slice(first, first + size)) for first in range(0, len(self), size))

    def poses(self) -> Tensor:
        """Flattened rotation and position (B, 12)."""
        return torch.cat([self.rotation.flatten(1), self.position], 1)

    def view_poses(self) -> Tensor:
        """Poses (B, 5) as a teacher is conditioned on (`distill.core.views`), of an object at the origin."""
        origin = -torch.einsum("bij,bi->bj", self.rotation, self.position)  # in camera axes
        distance = -origin[:, 2]
        offset = origin[:, :2] / (distance * torch.tan(self.fovy / 2))[:, None]
        angles = torch.deg2rad(torch.stack([self.azimuth, self.elevation], 1))
        return torch.cat([angles, distance[:, None], offset], 1)

    def rays(self) -> tuple[Tensor, Tensor]:
        """Origins and unit directions through the pixel centres, (B, H, W, 3) each, row 0 on top."""
        pixels = (torch.arange(self.resolution, device=self.position.device) + 0.5) / self.resolution * 2 - 1
        down, right = torch.meshgrid(pixels, pixels, indexing="ij")
        scale = torch.tan(self.fovy / 2)[:, None, None]
        local = torch.stack([right * scale, -down * scale, -torch.ones_like(scale * right)], dim=-1)
        directions = torch.einsum("bij,bhwj->bhwi", self.rotation, local)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        return self.position[:, None, None].expand_as(directions), directions


def orbit(
    azimuth: Tensor,
    elevation: Tensor,
    distance: Tensor,
    fovy: Tensor,
    resolution: int,
    target: Tensor | None = None,
) -> Cameras:
    """Cameras at angles (B,) in degrees and distance (B,) from `target` (B, 3), by default the origin.

    fovy (B,) is the vertical field of view in degrees.
    """
    theta, phi = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    zero = torch.zeros_like(theta)
    backward = torch.stack([phi.cos() * theta.cos(), phi.cos() * theta.sin(), phi.sin()], dim=-1)
    right = torch.stack([-theta.sin(), theta.cos(), zero], dim=-1)
    up = torch.linalg.cross(backward, right)
    position = backward * distance[:, None] + (0 if target is None else target)
    rotation = torch.stack([right, up, backward], dim=-1)
    return Cameras(position, azimuth, elevation, rotation, torch.deg2rad(fovy), resolution)


def sample_cameras(
    options: CameraOptions, count: int, resolution: int, generator: torch.Generator, stratified: bool = True
) -> Cameras:
    """Random cameras on the CPU; stratified, one in each of `count` equal parts of the azimuth range."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    low, high = options.azimuth
    fraction = torch.rand(count, generator=generator)
    azimuth = low + (high - low) * ((torch.arange(count) + fraction) / count if stratified else fraction)
    target = (torch.rand(count, 3, generator=generator) * 2 - 1) * options.centre_jitter
    elevation, distance, fovy = (uniform(*r) for r in (options.elevation, options.distance, options.fovy))
    return orbit(azimuth, elevation, distance, fovy, resolution, target)


def ring(
    count: int, elevation: float = 20.0, resolution: int = 64, distance: float = 3.0, fovy: float = 35.0
) -> Cameras:
    """`count` cameras at equal steps of azimuth, starting at the front: a turntable."""
    azimuth = torch.arange(count) * (360.0 / count)
    phi, radius, fov = (torch.full((count,), float(value)) for value in (elevation, distance, fovy))
    return orbit(azimuth, phi, radius, fov, resolution)
