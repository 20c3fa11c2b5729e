"""Novel views of what a picture shows, against the true views, for named objects and held-out assemblies."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.core.views import relative_poses
from distill.evaluation.directions import angular_error
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid, save_png
from distill.teacher.pictures import picture_conditioning
from distill.teacher.vae import psnr
from sds3d.evaluation.views.objects import KnownObject, composite, named_objects, silhouettes, unseen_objects
from sds3d.evaluation.views.sampling import ViewTeacher, image_psnr, silhouette_iou
from sds3d.evaluation.views.segmentation import segment
from sds3d.scene.cameras import CameraOptions, sample_cameras
from sds3d.world.assemblies import UNSEEN
from sds3d.world.shapes import OBJECTS

ANGLES = (0.0, 45.0, 90.0, 135.0, 180.0)  # degrees of azimuth between picture and view: bins of figures
GRID_PICTURES = 24  # at most


@dataclass(frozen=True)
class NovelViewOptions:
    """So many pictures of each object, and novel views of each, which are denoised together."""

    objects: tuple[str, ...] = OBJECTS
    unseen: int = len(UNSEEN)  # assemblies
    pictures: int = 2
    views: int = 3
    elevation: tuple[float, float] = (-10.0, 50.0)  # degrees, of pictures and views
    background: float = 0.7  # grey level of the pictures

    def __post_init__(self) -> None:
        if min(self.pictures, self.views) < 1 or not 0 <= self.unseen <= len(UNSEEN):
            raise UserError(
                f"pictures={self.pictures}, views={self.views}, unseen={self.unseen}: expected at least 1 of "
                f"the former and 0 to {len(UNSEEN)} unseen objects"
            )


@dataclass(frozen=True)
class PictureTask:
    """Renders (1 + V, 4, H, W) of an object and their poses (1 + V, 5); the first one is the picture."""

    name: str
    views: Tensor
    poses: Tensor


def picture_tasks(
    objects: Sequence[KnownObject], options: NovelViewOptions, resolution: int, seed: int
) -> list[PictureTask]:
    """The pictures of every object, from cameras that are a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for each in objects:
        for _ in range(options.pictures):
            cameras = sample_cameras(
                CameraOptions(elevation=options.elevation),
                1 + options.views,
                resolution,
                generator,
                stratified=False,
            )
            tasks.append(PictureTask(each.name, each.render(cameras), cameras.view_poses()))
    return tasks


def evaluate_novel_views(teacher: ViewTeacher, options: NovelViewOptions, folder: Path) -> dict[str, Any]:
    """Figures of `known` and `unseen` objects; novel_views_*.png: picture, samples and true views in a row.

    silhouette_iou; psnr in dB, the mean over images, and psnr_of_mean, of the mean squared error. `copy`:
    the same figures of the picture itself in place of every view; `reconstructed`: of the true views through
    the VAE, a ceiling; `by_angle`: by the azimuth between picture and view.
    """
    figures = {}
    for name, objects in (
        ("known", named_objects(options.objects)),
        ("unseen", unseen_objects(options.unseen)),
    ):
        if objects:
            tasks = picture_tasks(objects, options, teacher.teacher.resolution, teacher.options.seed)
            figures[name] = _evaluate(teacher, tasks, options, folder / f"novel_views_{name}.png")
    return figures


def _evaluate(
    teacher: ViewTeacher, tasks: list[PictureTask], options: NovelViewOptions, grid: Path
) -> dict[str, Any]:
    poses = torch.stack([task.poses for task in tasks])
    views = torch.stack([task.views for task in tasks])[:, 1:].flatten(0, 1)
    pictures = torch.cat([composite(task.views[:1], options.background) for task in tasks])
    samples = draw_novel_views(teacher, pictures, poses).flatten(0, 1)
    truth = composite(views, options.background)

    rows = [
        pictures[:GRID_PICTURES, None],
        *(each.unflatten(0, (-1, options.views))[:GRID_PICTURES] for each in (samples, truth)),
    ]
    save_png(grid, image_grid(torch.cat(rows, 1).flatten(0, 1), 2 * (1 + 2 * options.views)))
    figures = _figures(samples, truth, views)
    azimuth = torch.rad2deg(poses[:, :, 0])
    angles = angular_error(azimuth[:, 1:], azimuth[:, :1]).flatten()
    names = [task.name for task in tasks for _ in range(options.views)]
    copies = pictures.repeat_interleave(options.views, 0)
    return {
        **_means(figures),
        "images": len(samples),
        "by_angle": {
            f"{low:g} to {high:g}": _means(_selected(figures, (angles >= low) & (angles <= high)))
            for low, high in pairwise(ANGLES)
            if ((angles >= low) & (angles <= high)).any()
        },
        "copy": _means(_figures(copies, truth, views)),
        "reconstructed": _means(_figures(teacher.reconstruct(truth), truth, views)),
        "by_object": {
            name: _means(_selected(figures, torch.tensor([each == name for each in names])))
            for name in dict.fromkeys(names)
        },
    }


def draw_novel_views(teacher: ViewTeacher, pictures: Tensor, poses: Tensor) -> Tensor:
    """Samples (G, V, 3, H, W) of what pictures (G, 3, H, W) show, without a caption.

    poses (G, 1 + V, 5): the picture's first, with absolute azimuths; the teacher is given relative ones.
    """
    origin = poses[:, :1, 0].expand(poses.shape[:2]).flatten()
    relative = relative_poses(poses.flatten(0, 1), origin).view_as(poses)
    cond, uncond = picture_conditioning(
        teacher.teacher, teacher.clip, pictures, relative[:, 0], relative[:, 1:]
    )
    return teacher.sample(cond, uncond, "novel views").unflatten(0, (len(pictures), -1))


def _figures(images: Tensor, truth: Tensor, views: Tensor) -> dict[str, Tensor]:
    """By image (N,): the silhouettes' IoU, PSNR, and the mean squared error."""
    return {
        "silhouette_iou": silhouette_iou(segment(images), silhouettes(views)),
        "psnr": image_psnr(images, truth),
        "squared_error": (images - truth).square().flatten(1).mean(1),
    }


def _selected(figures: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    return {name: values[mask] for name, values in figures.items()}


def _means(figures: dict[str, Tensor]) -> dict[str, float]:
    error = figures["squared_error"].mean().clamp_min(1e-6)
    return {
        "silhouette_iou": float(figures["silhouette_iou"].mean()),
        "psnr": float(figures["psnr"].mean()),
        "psnr_of_mean": float(psnr(error)),
    }
