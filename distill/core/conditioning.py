"""What a prediction is conditioned on, as one batchable value."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from distill.runtime.errors import UserError
from distill.runtime.transfer import upload_all

# Names of extras: a text encoder's pooled embedding (B, D); sizes and crops of Stable Diffusion XL (B, 6).
POOLED, TIME_IDS = "pooled", "time_ids"


@final
@dataclass(frozen=True)
class Conditioning:
    """One row a sample: the main embedding (B, ...), and any further tensors (B, ...) by name.

    The embedding is what a network attends to: text embeddings (B, L, D), or component weights (B, 1, K) of
    a mixture. `extras` carries what else a teacher needs: pooled embeddings, time ids, class labels, cameras
    (`distill.core.views`); a teacher ignores those it does not know. Every `views` consecutive rows are views
    of one object, which a multi-view network denoises together.
    """

    embedding: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    views: int = 1

    def __post_init__(self) -> None:
        if self.views < 1 or len(self.embedding) % self.views:
            raise UserError(f"{len(self.embedding)} rows cannot be divided into groups of {self.views} views")
        sizes = {name: len(value) for name, value in self.extras.items() if len(value) != len(self.embedding)}
        if sizes:
            raise UserError(
                f"a conditioning of {len(self.embedding)} rows has extras of other sizes: {sizes}"
            )

    def __len__(self) -> int:
        return len(self.embedding)

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        """The same function applied to every tensor."""
        extras = {name: function(value) for name, value in self.extras.items()}
        return Conditioning(function(self.embedding), extras, self.views)

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same rows on another device."""
        embedding, *extras = upload_all([self.embedding, *self.extras.values()], device)
        return Conditioning(embedding, dict(zip(self.extras, extras, strict=True)), self.views)

    def select(self, indices: Tensor | slice) -> "Conditioning":
        """The rows at `indices` (N,), or of a slice; of several views a row, whole groups."""
        return self.apply(lambda value: value[indices])

    def split(self, size: int) -> list["Conditioning"]:
        """Consecutive parts of at most `size` rows."""
        return [self.select(slice(first, first + size)) for first in range(0, len(self), size)]

    def expand(self, count: int) -> "Conditioning":
        """A single row as `count` rows, without a copy; `count` rows as they are.

        Raises `UserError` for any other number of rows.
        """
        if len(self) == count:
            return self
        if len(self) != 1:
            raise UserError(
                f"a conditioning of {len(self)} rows cannot serve {count} samples: give 1 or {count}"
            )
        return self.apply(lambda value: value.expand(count, *value.shape[1:]))

    def repeat(self, times: int) -> "Conditioning":
        """The whole batch, `times` times in a row."""
        return self.apply(lambda value: value.repeat(times, *(1,) * (value.ndim - 1)))

    def repeat_interleave(self, times: int) -> "Conditioning":
        """Every row `times` times in a row."""
        return self.apply(lambda value: value.repeat_interleave(times, 0))

    def with_extras(self, **extras: Tensor) -> "Conditioning":
        """The same rows with further tensors (B, ...)."""
        return Conditioning(self.embedding, {**self.extras, **extras}, self.views)

    def grouped(self, views: int) -> "Conditioning":
        """The same rows as groups of `views` views of one object."""
        return Conditioning(self.embedding, self.extras, views)

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Batches one after the other. Raises `UserError` where their extras' names or views differ."""
        names, views = {frozenset(part.extras) for part in parts}, {part.views for part in parts}
        if len(names) != 1:
            raise UserError(f"conditionings with the extras {sorted(map(sorted, names))} cannot be joined")
        if len(views) != 1:
            raise UserError(f"conditionings of {sorted(views)} views a group cannot be joined")
        extras = {name: torch.cat([part.extras[name] for part in parts]) for name in parts[0].extras}
        return Conditioning(torch.cat([part.embedding for part in parts]), extras, views.pop())
