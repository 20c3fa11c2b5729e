"""Solid textures: a second colour as a function of the position on a surface, in the axes of a mesh."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Stripes:
    """Slabs of equal width across `normal`; the one around the origin has the first colour."""

    origin: np.ndarray  # (3,)
    normal: np.ndarray  # (3,) unit
    width: float  # of one stripe, world units

    def mask(self, points: np.ndarray) -> np.ndarray:
        """Whether points (N, 3) have the second colour (N,)."""
        return np.floor((points - self.origin) @ self.normal / self.width + 0.5) % 2 == 1


@dataclass(frozen=True)
class Dots:
    """Balls on a body-centred lattice: every plane along the axes cuts some of them."""

    origin: np.ndarray  # (3,) a lattice point
    axes: np.ndarray  # (3, 3) unit rows
    spacing: np.ndarray  # (3,) of the lattice along each axis, world units
    radius: float  # of a ball, world units

    def mask(self, points: np.ndarray) -> np.ndarray:
        """Whether points (N, 3) have the second colour (N,)."""
        local = (points - self.origin) @ self.axes.T / self.spacing
        inside = np.zeros(len(points), bool)
        for shift in (0.0, 0.5):
            offset = (local - shift - np.round(local - shift)) * self.spacing
            inside |= (offset**2).sum(1) < self.radius**2
        return inside


@dataclass(frozen=True)
class Pattern:
    """A texture on the faces first..last-1 of a mesh."""

    first: int
    last: int
    texture: Stripes | Dots
    colour: np.ndarray  # (3,) in [0, 1], the second colour

    def paint(self, colours: np.ndarray, points: np.ndarray, faces: np.ndarray) -> None:
        """Set the second colour in `colours` (N, 3) of points (N, 3) on faces (N,), in place."""
        rows = np.flatnonzero((faces >= self.first) & (faces < self.last))
        colours[rows[self.texture.mask(points[rows])]] = self.colour
