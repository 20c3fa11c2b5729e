"""Captions one word apart: the negatives that make a contrastive model read every word.

In the manner of NegCLIP (Yuksekgonul et al. 2023, arXiv:2210.01936, section 4): told from random captions alone, an image needs
its object and colour, never "front" against "back", and the text tower lets those two fall together.
"""

import torch
from torch import Tensor


class HardNegatives:
    """Which of the distinct captions `ids` (K, L) differ from another in exactly one place."""

    def __init__(self, ids: Tensor) -> None:
        order, place, start, size = [], [], [], []
        for position in range(ids.shape[1]):
            blanked = ids.clone()
            blanked[:, position] = -1
            group, count = blanked.unique(dim=0, return_inverse=True, return_counts=True)[1:]
            begin = (count.cumsum(0) - count)[group]
            by_group = group.argsort(stable=True)
            order.append(by_group)
            place.append(by_group.argsort() - begin)  # of a caption in its group
            start.append(begin)
            size.append(count[group])
        self.order, self.place, self.start, self.size = (
            torch.stack(value) for value in (order, place, start, size)
        )  # (L, K) each

    def draw(self, captions: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """`count` neighbours of each of the captions (B,), (B, count): first the place, then the other word at equal odds.

        A place counts by the logarithm of its choices: an object of many more than wording such as "a" and "the". A caption
        without a neighbour draws from all of them.
        """
        weights = self.size[:, captions].float().log().T  # (B, L)
        alone = weights.sum(1) == 0
        weights[alone, 0] = 1.0
        position = torch.multinomial(weights, count, replacement=True, generator=generator)  # (B, count)
        at = (position, captions[:, None])
        size = self.size[at]
        step = 1 + (torch.rand(position.shape, generator=generator) * (size - 1)).long().clamp_max_(size - 2)
        drawn = self.order[position, self.start[at] + (self.place[at] + step) % size]
        anything = torch.randint(self.size.shape[1], drawn.shape, generator=generator)
        return torch.where(alone[:, None], anything, drawn)
