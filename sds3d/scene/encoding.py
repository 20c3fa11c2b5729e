"""Multi-resolution grid encoding of positions (Mueller et al. 2022, "Instant Neural Graphics Primitives").

Two implementations: `TinyCudaEncoding` (tinycudann's kernels, CUDA) and `HashEncoding` (torch). They share
options and layout of the table, so a table saved by one loads into the other.
"""

import importlib.util
import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distill.runtime.errors import UserError

# Corners of more bytes are recomputed in the backward pass, which takes a fifth longer on a CPU. The default
# field's 64 bytes a sample and level stay below it up to 1.4 million samples.
SAVED_CORNERS = 2**29
# The primes of the spatial hash (Teschner et al. 2003); the second as the int32 of the same bits.
PRIMES = (1, 2654435761 - 2**32, 805459861)


@dataclass(frozen=True)
class HashEncodingOptions:
    """Sizes of the grid, in tinycudann's terms. Raises `UserError` for a size out of range.

    Level l has resolution `ceil(base_resolution * per_level_scale**l - 1) + 1` nodes a side. Where all its
    nodes fit into `2**log2_hashmap_size` entries it is stored densely, else they share the entries by a hash.
    """

    n_levels: int = 6
    n_features_per_level: int = 4
    log2_hashmap_size: int = 16  # larger tables leave the CPU's cache
    base_resolution: int = 8
    per_level_scale: float = 1.6  # six levels end at 84 nodes a side: about the pixel of a 64 x 64 view

    def __post_init__(self) -> None:
        minimum = min(
            self.n_levels, self.n_features_per_level, self.base_resolution - 1, self.per_level_scale
        )
        if minimum < 1:
            raise UserError(
                f"encoding of {self.n_levels} levels, {self.n_features_per_level} features, base "
                f"{self.base_resolution}, scale {self.per_level_scale}: "
                "at least 1 level, 1 feature, base 2 and scale 1 are needed"
            )
        if not 4 <= self.log2_hashmap_size <= 24:
            raise UserError(f"log2_hashmap_size is {self.log2_hashmap_size}: give a number from 4 to 24")

    def scales(self) -> list[float]:
        """Cells a side of each level, as tinycudann computes them (not whole numbers)."""
        return [self.base_resolution * self.per_level_scale**level - 1 for level in range(self.n_levels)]

    def resolutions(self) -> list[int]:
        """Nodes a side of each level."""
        return [math.ceil(scale) + 1 for scale in self.scales()]

    def sizes(self) -> list[int]:
        """Table entries of each level: dense ones padded to a multiple of 8, as in tinycudann."""
        return [min(-(-(nodes**3) // 8) * 8, 2**self.log2_hashmap_size) for nodes in self.resolutions()]

    def levels(self) -> list[tuple[float, int, int]]:
        """Cells a side, nodes a side and table entries of each level."""
        return list(zip(self.scales(), self.resolutions(), self.sizes(), strict=True))

    @property
    def border(self) -> float:
        """The coordinate in [0, 1] up to which no level needs a node outside of the box."""
        return min(1.0, *((math.ceil(scale) - 0.5) / scale for scale in self.scales()))

    @property
    def width(self) -> int:
        """Features of one encoded position."""
        return self.n_levels * self.n_features_per_level


@lru_cache
def _sparse_product_works() -> bool:
    """Whether torch has MKL, for fast CSR products on the CPU; suppresses the warning that CSR is in beta."""
    if not torch.backends.mkl.is_available():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))
    return True


def _gather(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums (N, F) of 8 rows of `table` (T, F) each; index, weight (N, 8)."""
    if table.is_cuda or not _sparse_product_works():
        return (table[index.long()] * weight[..., None]).sum(1)
    # A sparse matrix with eight entries a row: MKL's product is 25 times faster than indexing.
    starts = torch.arange(0, index.numel() + 1, 8, dtype=torch.int32)
    size = (len(index), len(table))
    rows = torch.sparse_csr_tensor(starts, index.flatten(), weight.flatten(), size, check_invariants=False)
    return rows @ table


class _Interpolate(torch.autograd.Function):
    """Sums of table entries for all levels; differentiable once, with respect to the table alone."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, options: HashEncodingOptions, axes: Tensor) -> Tensor:
        ctx.options = options
        # A level's 8 corners of a position have an int32 index and a weight each.
        size = options.n_levels * axes.shape[1] * 8 * (4 + axes.element_size())
        saved: list[Tensor] = []
        parts = []
        for level, part in zip(options.levels(), table.split(options.sizes()), strict=True):
            corners = level_corners(axes, *level)
            parts.append(_gather(part, *corners))
            if size <= SAVED_CORNERS:
                saved += corners
        ctx.save_for_backward(*(saved or [axes]))
        return torch.cat(parts, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        options, saved = ctx.options, ctx.saved_tensors
        parts = []
        # Feature-major: one-dimensional index_add is torch's fastest scatter on a CPU, and deterministic.
        by_level = grad.t().contiguous().split(options.n_features_per_level)
        for number, (level, columns) in enumerate(zip(options.levels(), by_level, strict=True)):
            recomputed = len(saved) == 1
            corners = level_corners(saved[0], *level) if recomputed else saved[2 * number : 2 * number + 2]
            index, weight = corners[0].flatten(), corners[1]
            part = grad.new_zeros(len(columns), level[2])
            values = torch.empty_like(weight)
            for row, column in zip(part, columns):
                row.index_add_(0, index, torch.mul(weight, column[:, None], out=values).flatten())
            parts.append(part.t())
        return torch.cat(parts), None, None


class HashEncoding(nn.Module):
    """Positions (N, 3) in [0, 1]^3 -> (N, n_levels * n_features_per_level), trilinear in each level.

    As in tinycudann a level's nodes are half a cell from the border (`x * scale + 0.5`). Where a coordinate
    exceeds `options.border` the border's value is repeated; tinycudann wraps around there, to the opposite
    side of the box. Positions get no gradient: normals are finite differences of density.

    On CUDA the gradient adds up in an order that differs from run to run, unless
    `torch.use_deterministic_algorithms` is on; tinycudann's always does.
    """

    def __init__(self, options: HashEncodingOptions) -> None:
        super().__init__()
        self.options = options
        self.table = nn.Parameter(
            torch.empty(sum(options.sizes()), options.n_features_per_level).uniform_(-1e-4, 1e-4)
        )

    def forward(self, positions: Tensor) -> Tensor:
        axes = positions.detach().t().to(self.table.dtype).contiguous()
        # Under autocast the sparse product would be in half precision, which has no CPU kernel.
        with torch.autocast(self.table.device.type, enabled=False):
            return _Interpolate.apply(self.table, self.options, axes)


def level_corners(axes: Tensor, scale: float, nodes: int, size: int) -> tuple[Tensor, Tensor]:
    """Table entries (N, 8) int32 and trilinear weights (N, 8) around positions `axes` (3, N) in one level."""
    coordinates = (axes * scale).add_(0.5).clamp_(0, nodes - 1)
    low = coordinates.floor().clamp_(max=nodes - 2)
    high_weight = coordinates.sub_(low)
    low_weight = 1 - high_weight
    entries = (_dense if nodes**3 <= size else _hashed)(low.int(), nodes, size)
    weights = torch.empty(8, axes.shape[1], dtype=axes.dtype, device=axes.device)
    by_side = (low_weight, high_weight)
    for pair in range(4):
        side = by_side[pair >> 1][2] * by_side[pair & 1][1]
        torch.mul(side, low_weight[0], out=weights[2 * pair])
        torch.mul(side, high_weight[0], out=weights[2 * pair + 1])
    return entries, weights.t().contiguous()


def _dense(low: Tensor, nodes: int, size: int) -> Tensor:
    base = (low[2] * nodes + low[1]) * nodes + low[0]
    corner = torch.arange(8, dtype=torch.int32, device=low.device)  # bits z y x
    steps = (corner & 1) + nodes * ((corner >> 1 & 1) + nodes * (corner >> 2))
    return base[:, None] + steps


def _hashed(low: Tensor, nodes: int, size: int) -> Tensor:
    # int32 products wrap; the masked low bits are those of tinycudann's uint32.
    axes = [(low[axis] * prime, low[axis] * prime + prime) for axis, prime in enumerate(PRIMES)]
    entries = torch.empty(8, low.shape[1], dtype=torch.int32, device=low.device)
    for pair in range(4):
        side = axes[2][pair >> 1] ^ axes[1][pair & 1]
        torch.bitwise_xor(side, axes[0][0], out=entries[2 * pair])
        torch.bitwise_xor(side, axes[0][1], out=entries[2 * pair + 1])
    return entries.bitwise_and_(size - 1).t().contiguous()


class TinyCudaEncoding(nn.Module):
    """The same encoding by tinycudann; its parameter is `table`, in `HashEncoding`'s layout. CUDA only."""

    def __init__(self, options: HashEncodingOptions) -> None:
        super().__init__()
        import tinycudann

        config = {
            "otype": "HashGrid",
            "n_levels": options.n_levels,
            "n_features_per_level": options.n_features_per_level,
            "log2_hashmap_size": options.log2_hashmap_size,
            "base_resolution": options.base_resolution,
            "per_level_scale": options.per_level_scale,
        }
        grid = tinycudann.Encoding(n_input_dims=3, encoding_config=config, dtype=torch.float32)
        table = grid.params.detach().float().view(-1, options.n_features_per_level)
        del grid.params  # here in the shape of `HashEncoding.table`
        self.options = options
        self.table = nn.Parameter(table)
        self._grid = (grid,)  # in a tuple, so that it is not registered as a child

    def forward(self, positions: Tensor) -> Tensor:
        grid = self._grid[0]
        grid.params = self.table.flatten()
        return grid(positions.detach()).float()


def make_encoding(
    options: HashEncodingOptions, device: torch.device | str
) -> HashEncoding | TinyCudaEncoding:
    """tinycudann's encoding on a CUDA device where it is installed, else that in torch; on `device`."""
    if torch.device(device).type == "cuda" and importlib.util.find_spec("tinycudann") is not None:
        return TinyCudaEncoding(options).to(device)
    return HashEncoding(options).to(device)
