"""Rings of views that a multi-view teacher draws together: do they show one solid, and the right one?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distill.core.views import POSE, relative_poses
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid, save_png
from distill.teacher.pictures import encode_pictures
from sds3d.evaluation.views.objects import KnownObject, composite, named_objects, silhouettes
from sds3d.evaluation.views.sampling import ViewTeacher, silhouette_iou
from sds3d.evaluation.views.segmentation import segment
from sds3d.evaluation.views.visual_hull import best_turn_iou, visual_hull, volume_iou, voxelise
from sds3d.scene.cameras import Cameras, ring
from sds3d.text_to_3d.view_groups import spread_groups
from sds3d.world.shapes import OBJECTS

GREY = 0.7  # behind the true views


@dataclass(frozen=True)
class MultiViewOptions:
    """A ring of `views` at one elevation, in groups that are denoised together and cover the whole circle.

    Groups after the first are either independent of it, or have its first view as their picture.
    """

    objects: tuple[str, ...] = OBJECTS
    views: int = 8
    views_per_group: int = 4
    elevation: float = 20.0  # degrees
    further_groups: Literal["independent", "pictured"] = "independent"

    def __post_init__(self) -> None:
        if self.views < 2 or self.views_per_group < 1 or self.views % self.views_per_group:
            raise UserError(
                f"{self.views} views cannot be divided into groups of {self.views_per_group}: at least 2, a "
                "multiple of views_per_group, are expected"
            )


def evaluate_multi_view(teacher: ViewTeacher, options: MultiViewOptions, folder: Path) -> dict[str, Any]:
    """Figures by object and their means; multi_view.png shows samples above true views.

    silhouette_iou: mean over the views; hull_iou: visual hull of the samples' silhouettes against that of
    the true ones (from the same cameras); hull_iou_turned: after the best quarter turn; solid_iou: against
    the true solid. `ceiling`: the same of true views, segmented as samples are, of reconstructions by the
    VAE, and of the true hull against the solid.
    """
    objects = named_objects(options.objects)
    cameras = spread_groups(
        ring(options.views, options.elevation, teacher.teacher.resolution), options.views_per_group
    )
    samples = draw_rings(teacher, objects, cameras, options)
    rows, ceilings, panels = {}, [], []
    for each, images in zip(objects, samples, strict=True):
        views = each.render(cameras)
        truth = composite(views, GREY)
        hull, solid = visual_hull(silhouettes(views), cameras), voxelise(each.shape.mesh)
        rows[each.name] = _figures(images, views, hull, solid, cameras)
        real, restored = (
            _figures(other, views, hull, solid, cameras) for other in (truth, teacher.reconstruct(truth))
        )
        ceilings.append(
            {"true_hull_solid_iou": volume_iou(hull, solid)}
            | {f"real_{name}": value for name, value in real.items()}
            | {f"reconstructed_{name}": value for name, value in restored.items()}
        )
        order = cameras.azimuth.argsort()
        panels += [images[order], truth[order]]
    save_png(folder / "multi_view.png", image_grid(torch.cat(panels), 2 * options.views))
    figures = {"mean": _means(list(rows.values())), "ceiling": _means(ceilings), "by_object": rows}
    return {**figures, "further_groups": options.further_groups}


def draw_rings(
    teacher: ViewTeacher, objects: Sequence[KnownObject], cameras: Cameras, options: MultiViewOptions
) -> Tensor:
    """Samples (K, V, 3, H, W) of K objects from V cameras, those of a group in consecutive places."""
    size = options.views_per_group
    count = 1 if options.further_groups == "pictured" else options.views // size
    device = teacher.teacher.device
    poses = cameras.view_poses().to(device)
    text = teacher.teacher.encode_text([each.caption for each in objects])
    first = text.repeat_interleave(count * size)
    first = first.with_extras(**{POSE: poses[: count * size].repeat(len(objects), 1)}).grouped(size)
    uncond = teacher.teacher.encode_text([""])
    images = [teacher.sample(first, uncond, "groups of views").unflatten(0, (len(objects), -1))]
    if count * size == options.views:
        return images[0]

    relative = relative_poses(poses, poses[:1, 0].expand(len(poses)))
    picture_pose = relative[:1].expand(len(objects), -1)
    condition = encode_pictures(teacher.teacher, teacher.clip, images[0][:, 0], picture_pose)
    for index in range(1, options.views // size):
        group = relative[index * size : (index + 1) * size].expand(len(objects), -1, -1)
        cond = condition.views(text.repeat_interleave(size), group)
        negative = condition.missing().views(uncond, group)
        samples = teacher.sample(cond, negative, "groups with a picture", seed=index)
        images.append(samples.unflatten(0, (len(objects), -1)))
    return torch.cat(images, 1)


def _figures(
    images: Tensor, views: Tensor, hull: np.ndarray, solid: np.ndarray, cameras: Cameras
) -> dict[str, float]:
    """Figures of images (V, 3, H, W) of one object against its views (V, 4, H, W)."""
    masks = segment(images)
    own = visual_hull(masks, cameras)
    return {
        "silhouette_iou": float(silhouette_iou(masks, silhouettes(views)).mean()),
        "hull_iou": volume_iou(own, hull),
        "hull_iou_turned": best_turn_iou(own, hull),
        "solid_iou": volume_iou(own, solid),
    }


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
