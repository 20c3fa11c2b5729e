"""The camera of a picture relative to a scene that shows the same kind of object, by rendering and comparing.

Views of the scene are brought to the picture's frame, so that angles can be compared apart from size and
place; these follow from the best view.
"""

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from sds3d.scene.cameras import Cameras, orbit
from sds3d.scene.protocol import Scene3D
from sds3d.text_to_3d.picture import EXTENT, CutOut, Frame, Picture, silhouette_bounds

DISTANCE, FOVY = 3.0, 35.0  # of the picture's camera: what `EXTENT` of `picture.py` belongs to
ELEVATIONS = tuple(float(degrees) for degrees in range(-5, 70, 10))
AZIMUTHS = 24
REFINEMENTS = (7.0, 3.5, 2.0, 1.0)  # degrees, around the best `CANDIDATES` cameras and then the best one
CANDIDATES = 4
FRAME_STEPS = (0.03, 0.015, 0.008)  # half-widths, for place and size
GREY = 0.5
CHUNK = 24  # views rendered at once


@dataclass(frozen=True)
class Alignment:
    """Angles in degrees and the frame in which a picture fits a scene best.

    error: mean squared difference in colours over grey and in alpha, in the picture's own frame.
    """

    azimuth: float
    elevation: float
    frame: Frame
    error: float


def picture_camera(azimuth: float, elevation: float, resolution: int) -> Cameras:
    """The camera of a picture at angles in degrees."""
    return _cameras([(azimuth, elevation)], resolution)


@torch.no_grad()
def align_picture(
    scene: Scene3D, cut_out: CutOut, resolution: int, elevation: float | None = None
) -> Alignment | None:
    """Where a picture fits a scene best, in views of `resolution` pixels; None where all views are empty.

    elevation: in degrees, where it is known.
    """
    picture = cut_out.picture(resolution)
    elevations = ELEVATIONS if elevation is None else (elevation,)
    azimuths = [360.0 / AZIMUTHS * index for index in range(AZIMUTHS)]
    angles = list(product(azimuths, elevations))
    errors = _errors(scene, picture, angles, resolution)
    if not bool(errors.isfinite().any()):
        return None
    best = [angles[index] for index in errors.topk(CANDIDATES, largest=False).indices]
    for step in REFINEMENTS:
        tilts = (0.0,) if elevation is not None else (-step, 0.0, step)
        turns = tuple(product((-step, 0.0, step), tilts))
        angles = list(dict.fromkeys((a + turn, e + tilt) for a, e in best for turn, tilt in turns))
        errors = _errors(scene, picture, angles, resolution)
        best = [angles[int(errors.argmin())]]
    azimuth, phi = best[0]
    frame = _fit_frame(scene, cut_out, picture_camera(azimuth, phi, resolution))
    return Alignment((azimuth + 180) % 360 - 180, phi, frame, float(errors.amin()))


def _cameras(angles: list[tuple[float, float]], resolution: int) -> Cameras:
    azimuth, elevation = torch.tensor(angles).T
    distance, fovy = (torch.full((len(angles),), value) for value in (DISTANCE, FOVY))
    return orbit(azimuth, elevation, distance, fovy, resolution)


def _render(scene: Scene3D, cameras: Cameras) -> Tensor:
    """Views (B, 4, R, R) on the CPU: colours over grey and opacity."""
    parts = []
    for part in cameras.split(CHUNK):
        views = scene.render(part.to(scene.device), torch.full((len(part), 3), GREY, device=scene.device))
        parts.append(torch.cat([views.rgb, views.opacity], 1).cpu())
    return torch.cat(parts)


def _stack(picture: Picture) -> Tensor:
    """A picture as a view (1, 4, R, R) of `_render`."""
    return torch.cat([picture.over(torch.full((1, 3), GREY)), picture.alpha[None]], 1)


def _errors(scene: Scene3D, picture: Picture, angles: list[tuple[float, float]], resolution: int) -> Tensor:
    """The picture's squared error (B,) to views at angles, each in the picture's frame; infinite if empty."""
    views = _render(scene, _cameras(angles, resolution))
    centre, radius = silhouette_bounds(views[:, 3])
    scale = radius / (EXTENT * resolution / 2)
    shift = centre / (resolution / 2) - 1
    theta = torch.zeros(len(views), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale.nan_to_num(1.0)
    theta[:, :, 2] = shift
    # Outside of a view are the grey and no opacity.
    outside = torch.tensor([GREY, GREY, GREY, 0.0])[:, None, None]
    grid = F.affine_grid(theta, list(views.shape), align_corners=False)
    framed = F.grid_sample(views - outside, grid, align_corners=False) + outside
    errors = (framed - _stack(picture)).square().mean((1, 2, 3))
    return torch.where(radius.isfinite(), errors, torch.inf)


def _fit_frame(scene: Scene3D, cut_out: CutOut, camera: Cameras) -> Frame:
    """Place and size at which a picture fits the view of a camera best: those of its silhouette, refined."""
    view, half = _render(scene, camera), camera.resolution / 2
    (centre,), (radius,) = silhouette_bounds(view[:, 3])
    right, down = (centre / half - 1).tolist()
    best = Frame(right, down, float(radius) / half)

    def error(frame: Frame) -> float:
        return float((_stack(cut_out.picture(camera.resolution, frame)) - view).square().mean())

    for step in FRAME_STEPS:
        offsets = product((-step, 0.0, step), repeat=3)
        candidates = [
            replace(best, right=best.right + x, down=best.down + y, extent=best.extent + size)
            for x, y, size in offsets
        ]
        best = min(candidates, key=error)
    return best
