"""Pinhole cameras on a sphere around the object.

Convention, used by the world's renders and by the NeRF alike: z is up, azimuth 0 puts the camera on +x, looking at
the object's front; azimuth grows towards +y (counter-clockwise seen from above). Image row 0 is the top.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.runtime.errors import UserError


@dataclass(frozen=True)
class CameraOptions:
    """Ranges that random cameras are drawn from (uniform each). Angles in degrees, lengths in world units.

    Raises `UserError` for an empty range or an angle that no camera can have.
    """

    elevation: tuple[float, float] = (-10.0, 80.0)
    azimuth: tuple[float, float] = (-180.0, 180.0)
    distance: tuple[float, float] = (2.75, 3.25)  # mild zoom around 3
    fovy: tuple[float, float] = (35.0, 35.0)
    centre_jitter: float = 0.05  # half-width of the uniform offset of the point looked at
    resolution: int = 64

    def __post_init__(self) -> None:
        limits = {"elevation": (-89, 89), "azimuth": (-360, 360), "distance": (1e-3, 1e3), "fovy": (1, 170)}
        values = {
            "elevation": self.elevation,
            "azimuth": self.azimuth,
            "distance": self.distance,
            "fovy": self.fovy,
        }
        for name, (low, high) in values.items():
            least, most = limits[name]
            if not least <= low <= high <= most:
                raise UserError(
                    f"camera {name} is [{low}, {high}]: give two numbers, low then high, within [{least}, {most}]"
                )
        if self.resolution < 8:
            raise UserError(f"camera resolution is {self.resolution}: at least 8 pixels are needed")
        if not 0 <= self.centre_jitter <= 1e3:
            raise UserError(
                f"camera centre_jitter is {self.centre_jitter}: a half-width of 0 or more world units is expected"
            )


@dataclass(frozen=True)
class Cameras:
    """A batch of square pinhole cameras.

    position (B, 3); azimuth, elevation (B,) degrees, of the camera as seen from the point looked at; rotation (B, 3, 3)
    with columns right, up, backward (the camera looks along minus the third); fovy (B,) radians; resolution in pixels.
    """

    position: Tensor
    azimuth: Tensor
    elevation: Tensor
    rotation: Tensor
    fovy: Tensor
    resolution: int

    def __len__(self) -> int:
        return len(self.position)

    def to(self, device: torch.device | str) -> "Cameras":
        """The same cameras on another device."""
        tensors = (self.position, self.azimuth, self.elevation, self.rotation, self.fovy)
        return Cameras(*(value.to(device) for value in tensors), self.resolution)

    def at(self, resolution: int) -> "Cameras":
        """The same views at another resolution."""
        return Cameras(self.position, self.azimuth, self.elevation, self.rotation, self.fovy, resolution)

    def some(self, at: Tensor) -> "Cameras":
        """The views at indices (K,)."""
        parts = (self.position, self.azimuth, self.elevation, self.rotation, self.fovy)
        return Cameras(*(value[at] for value in parts), self.resolution)

    def poses(self) -> Tensor:
        """Rotation and position as numbers (B, 12)."""
        return torch.cat([self.rotation.flatten(1), self.position], 1)

    def rays(self) -> tuple[Tensor, Tensor]:
        """Origins and unit directions through the pixel centres, (B, H, W, 3) each, row 0 on top."""
        steps = (torch.arange(self.resolution, device=self.position.device) + 0.5) / self.resolution * 2 - 1
        down, right = torch.meshgrid(steps, steps, indexing="ij")
        reach = torch.tan(self.fovy / 2)[:, None, None]
        local = torch.stack([right * reach, -down * reach, -torch.ones_like(reach * right)], dim=-1)
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
    """Cameras at angles (B,) in degrees and distance (B,) from `target` (B, 3; the origin when None), fovy (B,) degrees."""
    theta, phi = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    zero = torch.zeros_like(theta)
    backward = torch.stack([phi.cos() * theta.cos(), phi.cos() * theta.sin(), phi.sin()], dim=-1)
    right = torch.stack([-theta.sin(), theta.cos(), zero], dim=-1)
    up = torch.linalg.cross(backward, right)
    position = backward * distance[:, None] + (0 if target is None else target)
    return Cameras(
        position,
        azimuth,
        elevation,
        torch.stack([right, up, backward], dim=-1),
        torch.deg2rad(fovy),
        resolution,
    )


def sample_cameras(
    options: CameraOptions, count: int, generator: torch.Generator, stratified: bool = True
) -> Cameras:
    """Random cameras on the CPU. Stratified: the azimuth range is cut into `count` equal parts, one camera in each."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    low, high = options.azimuth
    share = torch.rand(count, generator=generator)
    azimuth = low + (high - low) * ((torch.arange(count) + share) / count if stratified else share)
    target = (torch.rand(count, 3, generator=generator) * 2 - 1) * options.centre_jitter
    return orbit(
        azimuth,
        uniform(*options.elevation),
        uniform(*options.distance),
        uniform(*options.fovy),
        options.resolution,
        target,
    )


def ring(
    count: int, elevation: float = 20.0, resolution: int = 64, distance: float = 3.0, fovy: float = 35.0
) -> Cameras:
    """`count` cameras at equal steps of azimuth, from the front on: a turntable."""
    azimuth = torch.arange(count) * (360.0 / count)
    return orbit(azimuth, *(torch.full((count,), float(v)) for v in (elevation, distance, fovy)), resolution)
