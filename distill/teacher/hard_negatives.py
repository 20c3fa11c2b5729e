"""Captions one word apart: negatives that make a contrastive model use every word of a caption.

In the manner of NegCLIP (Yuksekgonul et al. 2023, arXiv:2210.01936, section 4). Against random captions the
object and the colour of an image suffice: the text tower maps "front" and "back" to nearly the same features.
"""

import torch
from torch import Tensor


class HardNegatives:
    """For each of K distinct captions, those that differ from it in exactly one token.

    Captions that agree everywhere but at position l form a group of position l. The tables are (L, K):
    `order` lists the captions group after group; a caption's group begins at `group_start` in it and has
    `group_size` members, of which the caption is number `rank`.
    """

    def __init__(self, ids: Tensor) -> None:
        """ids: token ids (K, L), all rows distinct."""
        order, rank, group_start, group_size = [], [], [], []
        for position in range(ids.shape[1]):
            masked = ids.clone()
            masked[:, position] = -1
            group, count = masked.unique(dim=0, return_inverse=True, return_counts=True)[1:]
            start = (count.cumsum(0) - count)[group]
            by_group = group.argsort(stable=True)
            order.append(by_group)
            rank.append(by_group.argsort() - start)
            group_start.append(start)
            group_size.append(count[group])
        self.order, self.rank = torch.stack(order), torch.stack(rank)
        self.group_start, self.group_size = torch.stack(group_start), torch.stack(group_size)

    def sample(self, captions: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Indices (B, count) of neighbours of captions (B,): a random position, then a uniform other token.

        The odds of a position are the logarithm of its group's size: a noun with many alternatives counts
        more than "a" against "the". A caption without a neighbour samples from all captions.
        """
        weights = self.group_size[:, captions].float().log().T  # (B, L)
        isolated = weights.sum(1) == 0
        weights[isolated, 0] = 1.0
        position = torch.multinomial(weights, count, replacement=True, generator=generator)  # (B, count)

        entry = (position, captions[:, None])
        size = self.group_size[entry]
        uniform = torch.rand(position.shape, generator=generator)
        offset = 1 + (uniform * (size - 1)).long().clamp_max_(
            size - 2
        )  # 1 to size - 1: never the caption itself
        neighbours = self.order[position, self.group_start[entry] + (self.rank[entry] + offset) % size]

        any_caption = torch.randint(self.group_size.shape[1], neighbours.shape, generator=generator)
        return torch.where(isolated[:, None], any_caption, neighbours)
