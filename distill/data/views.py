"""Sets of views: images in groups that show one object from several cameras, and what a training step takes.

A captioned folder holds them where every row of its metadata has a `pose` (`distill.core.views`) and a
`group`; the rows of a group are consecutive, and all groups have the same number of rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.views import POSE_DIM
from distill.data.folders import CaptionedImages, grey_levels
from distill.runtime.errors import UserError


@dataclass(frozen=True)
class ViewLabels:
    """Cameras and groups of N images, in their order.

    poses (N, 5); image_embedding (N, D) of CLIP's image tower; has_caption (N,), whether the image has a
    caption; group_size: consecutive rows that show one object.
    """

    poses: Tensor
    image_embedding: Tensor
    has_caption: Tensor
    group_size: int

    @property
    def groups_with_caption(self) -> Tensor:
        """The first rows of groups with captions."""
        return self.first_rows[self.has_caption[self.first_rows]]

    @property
    def first_rows(self) -> Tensor:
        """The first row of every group."""
        return torch.arange(0, len(self.poses), self.group_size, device=self.poses.device)

    def to(self, device: torch.device) -> "ViewLabels":
        """The same labels on another device."""
        poses, embedding, has_caption = self.poses, self.image_embedding, self.has_caption
        return ViewLabels(poses.to(device), embedding.to(device), has_caption.to(device), self.group_size)


def has_views(data: CaptionedImages) -> bool:
    """Whether every row has a pose and a group."""
    return all("pose" in row and "group" in row for row in data.rows)


def group_size_of(data: CaptionedImages) -> int:
    """Rows of a group. Raises `UserError` where groups differ in size, or poses have another length."""
    groups = torch.tensor([row["group"] for row in data.rows])
    _, counts = groups.unique_consecutive(return_counts=True)
    sizes = counts.unique().tolist()
    if len(sizes) != 1 or len(counts) != len(groups.unique()):
        raise UserError(f"the groups of views have {sizes} consecutive rows: one number of rows is expected")
    wrong = next((row["pose"] for row in data.rows if len(row["pose"]) != POSE_DIM), None)
    if wrong is not None:
        raise UserError(
            f"the pose {wrong} has {len(wrong)} numbers: expected azimuth, elevation (radians), distance and "
            "the object's offset to the right and up"
        )
    return sizes[0]


def label_views(data: CaptionedImages, image_embedding: Tensor) -> ViewLabels:
    """The labels of a split's images. Raises `UserError` as `group_size_of`."""
    size = group_size_of(data)
    poses = torch.tensor([row["pose"] for row in data.rows], dtype=torch.float32)
    has_caption = torch.tensor([bool(text.strip()) for text in data.texts])
    return ViewLabels(poses, image_embedding, has_caption, size)


def group_backgrounds(count: int, group_size: int) -> Tensor:
    """Grey levels (count,), one for all images of a group; the same at every call."""
    return grey_levels(-(-count // group_size)).repeat_interleave(group_size)[:count]


def choose_views(first_rows: Tensor, group_size: int, views: int, generator: torch.Generator) -> Tensor:
    """Row indices (G, views): random rows, without repetition, of the groups that begin at `first_rows`."""
    values = torch.rand(len(first_rows), group_size, generator=generator, device=generator.device)
    order = values.argsort(1)[:, :views]
    return first_rows[:, None] + order
