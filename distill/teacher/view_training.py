"""Training batches of a multi-view U-Net: single images, groups of views, and views of a pictured object.

Jointly, as MVDream does (arXiv:2308.16512, section 3.3), so that the text-to-image model stays whole.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.views import IMAGE_EMBEDDING, POSE, REFERENCE, REFERENCE_POSE, relative_poses
from distill.data.folders import batch_indices
from distill.data.latents import LatentCache
from distill.data.views import ViewLabels, choose_views
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload


@dataclass(frozen=True)
class ViewTrainingOptions:
    """What the rows of a batch are, as fractions, and how often conditions are dropped.

    The rest of a batch are single images of captioned objects, each with its own noise level.
    """

    views: int = 4  # rows of a group, the picture's row included
    grouped: float = 0.3  # groups of captioned objects, noised to one level (MVDream: 0.7)
    pictured: float = 0.3  # groups of any object, one row of which is its picture, without noise
    nameless: float = 0.6  # of the pictured groups: objects without caption, where there are any
    pose_dropout: float = 0.3  # of single images, so that the stock text-to-image model stays whole
    picture_text: float = 0.2  # of the pictured groups that keep their caption
    picture_dropout: float = 0.1  # of the pictured groups, for classifier-free guidance
    embedding_dropout: float = 0.3  # of the pictured groups: CLIP's embedding of the picture alone
    width: int = 256  # of the layers that read the pose, the text and the picture together

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("views", "width") and not 0 <= value <= 1:
                raise UserError(f"{name} is {value}: a fraction in [0, 1] is expected")
        if self.views < 2 or self.width < 1 or self.grouped + self.pictured > 1:
            raise UserError(
                f"views={self.views}, grouped={self.grouped}, pictured={self.pictured}: at least 2 views and "
                "fractions that sum to at most 1 are expected"
            )

    def counts(self, batch: int) -> tuple[int, int, int]:
        """Single images, groups of views and pictured groups of a batch of so many rows."""
        grouped, pictured = (round(batch * part / self.views) for part in (self.grouped, self.pictured))
        return batch - (grouped + pictured) * self.views, grouped, pictured


class DenoisingBatch(NamedTuple):
    """Clean latents (B, C, h, w), their noise, times (B,) and conditioning, on the device of the data."""

    latents: Tensor
    noise: Tensor
    t: Tensor
    conditioning: Conditioning

    def select(self, rows: slice) -> "DenoisingBatch":
        """Some of the rows, whole groups of views."""
        latents, noise, t = (value[rows] for value in self[:3])
        return DenoisingBatch(latents, noise, t, self.conditioning.select(rows))


def bernoulli(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """Which of so many rows are chosen (count,), each with `probability`, on the generator's device."""
    return torch.rand(count, generator=generator, device=generator.device) < probability


def random_times(times: int, count: int, generator: torch.Generator) -> Tensor:
    """Times (count,) below `times`, on the generator's device."""
    return torch.randint(times, (count,), generator=generator, device=generator.device)


def random_noise(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise of the latents' shape, on the generator's device."""
    return torch.randn(latents.shape, generator=generator, device=generator.device)


class ImageBatches:
    """Batches of single images with their captions, each with its own noise level.

    The generator of `draw` must be on the device of the cache.
    """

    def __init__(self, cache: LatentCache, batch: int, seed: int) -> None:
        self.cache, self.batch, self.seed = cache, batch, seed

    def draw(
        self, step: int, generator: torch.Generator, times: int, text_dropout: float
    ) -> list[DenoisingBatch]:
        """The batch at a step, in one part."""
        index = upload(batch_indices(len(self.cache), self.batch, step, self.seed), generator.device)
        t = random_times(times, len(index), generator)
        latents = self.cache.latents_of(index)
        noise = random_noise(latents, generator)
        dropped = bernoulli(len(index), text_dropout, generator)
        return [DenoisingBatch(latents, noise, t, self.cache.conditioning_of(index, dropped))]


class ViewBatches:
    """The batches of a cache with view labels; each is a function of the step and the run's generator.

    The generator of `draw` must be on the device of the cache and the labels.
    """

    def __init__(
        self, cache: LatentCache, labels: ViewLabels, options: ViewTrainingOptions, batch: int, seed: int
    ) -> None:
        """Raises `UserError` where groups have too few views."""
        if labels.group_size < options.views:
            raise UserError(
                f"groups have {labels.group_size} views and training takes {options.views}: "
                "make data with more, or set teacher.unet.views.views"
            )
        self.cache, self.labels, self.options, self.batch, self.seed = cache, labels, options, batch, seed
        self.has_caption = labels.has_caption.nonzero()[:, 0]
        self.named = labels.groups_with_caption
        self.nameless = labels.first_rows[~labels.has_caption[labels.first_rows]]
        self.empty = torch.full_like(labels.poses[0], torch.nan)

    def draw(
        self, step: int, generator: torch.Generator, times: int, text_dropout: float
    ) -> list[DenoisingBatch]:
        """The parts of the batch at a step; each is one call of the network."""
        single, grouped, pictured = self.options.counts(self.batch)
        parts = []
        if single:
            index = self.has_caption[self._indices(len(self.has_caption), single, step)]
            t = random_times(times, single, generator)
            parts.append(self._single(index, t, text_dropout, generator))
        if grouped:
            rows = self._rows(self.named, grouped, step, generator)
            t = random_times(times, grouped, generator)
            parts.append(self._grouped(rows, t, text_dropout, generator))
        if pictured:
            count = round(pictured * self.options.nameless) if len(self.nameless) else 0
            pools = [(self.nameless, count), (self.named, pictured - count)]
            rows = torch.cat([self._rows(*pool, step, generator) for pool in pools if pool[1]])
            t = random_times(times, pictured, generator)
            parts.append(self._pictured(rows, t, generator))
        return parts

    def _rows(self, pool: Tensor, count: int, step: int, generator: torch.Generator) -> Tensor:
        first = pool[self._indices(len(pool), count, step)]
        return choose_views(first, self.labels.group_size, self.options.views, generator)

    def _indices(self, count: int, size: int, step: int) -> Tensor:
        return upload(batch_indices(count, size, step, self.seed), self.empty.device)

    def _single(
        self, index: Tensor, t: Tensor, text_dropout: float, generator: torch.Generator
    ) -> DenoisingBatch:
        no_text = bernoulli(len(index), text_dropout, generator)
        no_pose = bernoulli(len(index), self.options.pose_dropout, generator)
        poses = torch.where(no_pose[:, None], self.empty, self.labels.poses[index])
        conditioning = self.cache.conditioning_of(index, no_text).with_extras(**{POSE: poses})
        return self._noised(index, t, conditioning, generator)

    def _grouped(
        self, rows: Tensor, t: Tensor, text_dropout: float, generator: torch.Generator
    ) -> DenoisingBatch:
        no_text = bernoulli(len(rows), text_dropout, generator)
        views, index = rows.shape[1], rows.flatten()
        conditioning = self.cache.conditioning_of(index, no_text.repeat_interleave(views))
        conditioning = conditioning.with_extras(**{POSE: self.labels.poses[index]}).grouped(views)
        return self._noised(index, t.repeat_interleave(views), conditioning, generator)

    def _pictured(self, rows: Tensor, t: Tensor, generator: torch.Generator) -> DenoisingBatch:
        """Azimuths are counted from the picture's: nothing says what is the front of what it shows."""
        groups, views = len(rows), rows.shape[1] - 1
        pictures, index = rows[:, 0].repeat_interleave(views), rows[:, 1:].flatten()
        no_text = ~bernoulli(groups, self.options.picture_text, generator)
        no_picture = bernoulli(groups, self.options.picture_dropout, generator)
        no_embedding = bernoulli(groups, self.options.embedding_dropout, generator)

        poses, origin = self.labels.poses, self.labels.poses[pictures, 0]
        embedding = self.labels.image_embedding[pictures].float()
        hidden = (no_embedding | no_picture).repeat_interleave(views)[:, None]
        dropped = no_picture.repeat_interleave(views)[:, None, None, None]
        extras = {
            POSE: relative_poses(poses[index], origin),
            REFERENCE: self.cache.latents_of(pictures).masked_fill(dropped, torch.nan),
            REFERENCE_POSE: relative_poses(poses[pictures], origin),
            IMAGE_EMBEDDING: embedding.masked_fill(hidden, torch.nan),
        }
        conditioning = self.cache.conditioning_of(index, no_text.repeat_interleave(views))
        conditioning = conditioning.with_extras(**extras).grouped(views)
        return self._noised(index, t.repeat_interleave(views), conditioning, generator)

    def _noised(
        self, index: Tensor, t: Tensor, conditioning: Conditioning, generator: torch.Generator
    ) -> DenoisingBatch:
        latents = self.cache.latents_of(index)
        noise = random_noise(latents, generator)
        return DenoisingBatch(latents, noise, t, conditioning)
