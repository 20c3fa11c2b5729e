"""Whether samples of single objects show the azimuth that was asked for, read by a judge."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.core.views import POSE
from distill.data.folders import grey_levels
from distill.evaluation.directions import angular_error, error_figures
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid, save_png
from sds3d.evaluation.views.objects import KnownObject, composite, named_objects
from sds3d.evaluation.views.sampling import ViewTeacher
from sds3d.scene.cameras import CameraOptions, Cameras, sample_cameras
from sds3d.text_to_3d.prompts import view_of, view_prompt
from sds3d.world.shapes import OBJECTS, make_shape

COLUMNS = 16  # of the grid
ReadAzimuth = Callable[[Tensor], Tensor]  # images (N, 3, H, W) to degrees (N,)


@dataclass(frozen=True)
class AzimuthOptions:
    """So many samples of the objects that have a front, in turn, from random cameras."""

    samples: int = 520  # 40 of each object
    elevation: tuple[float, float] = (-10.0, 50.0)  # degrees; from above, azimuths have no view word

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"azimuth samples is {self.samples}: at least 1 is expected")


def evaluate_azimuths(
    teacher: ViewTeacher, read_azimuth: ReadAzimuth, options: AzimuthOptions, folder: Path
) -> dict[str, Any]:
    """Figures of real renders, of samples by camera and by view word; a grid of the three as azimuth.png.

    `within_15`, `flips`, `median_error` of the azimuth that was asked for (`error_figures`). `view`: the
    azimuth is in the range of its view word; `view_flips`: a front for a back or a back for a front.
    """
    objects = named_objects([name for name in OBJECTS if make_shape(name).has_front])
    chosen = [objects[i % len(objects)] for i in range(options.samples)]
    generator = torch.Generator().manual_seed(teacher.options.seed)
    side, limits = teacher.teacher.resolution, CameraOptions(elevation=options.elevation)
    cameras = sample_cameras(limits, len(chosen), side, generator, stratified=False)
    images = _images(teacher, chosen, cameras)
    grid = torch.stack([each[: 4 * COLUMNS] for each in images.values()], 1)
    save_png(folder / "azimuth.png", image_grid(_in_bands(grid), COLUMNS))

    figures: dict[str, Any] = {"samples": len(chosen)}
    for name, each in images.items():
        angles = read_azimuth(each)
        figures[name] = view_figures(angles, cameras)
        if name != "view_words":  # which stand for ranges
            errors = angular_error(angles, cameras.azimuth)
            figures[name] |= {**error_figures(errors), "within_15_by_object": _by_object(errors, chosen)}
    return figures


def _images(teacher: ViewTeacher, objects: Sequence[KnownObject], cameras: Cameras) -> dict[str, Tensor]:
    """Real renders of N objects, samples by camera, and samples by view word, (N, 3, H, W) each."""
    views = torch.cat([o.render(camera) for o, camera in zip(objects, cameras.split(1), strict=True)])
    prompts = [view_prompt(o.caption, word) for o, word in zip(objects, _words(cameras), strict=True)]
    encode = teacher.teacher.encode_text
    text, uncond = encode([each.caption for each in objects]), encode([""])
    posed = text.with_extras(**{POSE: cameras.view_poses().to(teacher.teacher.device)})
    return {
        "real": composite(views, grey_levels(len(objects))),
        "camera": teacher.sample(posed, uncond, "samples by camera"),
        "view_words": teacher.sample(encode(prompts), uncond, "samples by view word"),
    }


def _by_object(errors: Tensor, objects: Sequence[KnownObject]) -> dict[str, float]:
    """The fraction of errors (N,) within 15 degrees, by the name of their object."""
    names = [each.name for each in objects]
    return {
        name: error_figures(errors[[n == name for n in names]])["within_15"] for name in dict.fromkeys(names)
    }


def _words(cameras: Cameras) -> list[str]:
    angles = zip(cameras.azimuth.tolist(), cameras.elevation.tolist(), strict=True)
    return [view_of(azimuth, elevation) for azimuth, elevation in angles]


def _in_bands(images: Tensor) -> Tensor:
    """Images (N, K, 3, H, W) as a batch that a grid of `COLUMNS` shows in bands of K rows."""
    bands = [part.transpose(0, 1).flatten(0, 1) for part in images.split(COLUMNS)]
    return torch.cat(bands)


def view_figures(angles: Tensor, cameras: Cameras) -> dict[str, float]:
    """Of azimuths (N,) in degrees: how often they are in the range of the cameras' view word, or opposite."""
    words, read = _words(cameras), [view_of(angle, 0.0) for angle in angles.tolist()]
    pairs = list(zip(words, read, strict=True))
    opposite = [{first, second} == {"front", "back"} for first, second in pairs if first != "side"]
    return {
        "view": sum(first == second for first, second in pairs) / len(pairs),
        "view_flips": sum(opposite) / max(len(opposite), 1),
    }
