"""In place of tinycudann: its grid encoding in torch, on CUDA, in float32.

After tiny-cuda-nn's include/tiny-cuda-nn/encodings/grid.h (Mueller 2021) and its torch bindings: flat
parameters, uint32 arithmetic, `pos_fract`'s half cell, and its wrapping beyond the last node.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

PRIMES = (1, 2654435761, 805459861)
UINT32 = 0xFFFFFFFF
BATCH_SIZE_GRANULARITY = 256


class Encoding(nn.Module):
    """`tinycudann.Encoding` of otype HashGrid for positions (N, 3): features (N, levels * features)."""

    def __init__(
        self,
        n_input_dims: int,
        encoding_config: dict[str, Any],
        seed: int = 1337,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = encoding_config
        if dtype not in (torch.float32, torch.float16, None):
            raise ValueError(f"Encoding only supports fp32 or fp16 precision, but got {dtype}")
        if config["n_features_per_level"] not in (1, 2, 4, 8):
            raise RuntimeError("GridEncoding: n_features_per_level must be 1, 2, 4, or 8.")
        self.n_input_dims, self.encoding_config, self.seed, self.dtype = n_input_dims, config, seed, dtype
        self.features = config["n_features_per_level"]
        self.n_output_dims = self.features * config["n_levels"]
        self.levels = [_level(config, level) for level in range(config["n_levels"])]
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(sum(size for *_, size in self.levels) * self.features, generator=generator)
        self.params = nn.Parameter(((values * 2 - 1) * 1e-4).cuda())

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            raise RuntimeError("TCNN WARNING: input must be a CUDA tensor, but isn't")
        if x.ndim != 2 or x.shape[1] != self.n_input_dims or self.params.ndim != 1:
            raise RuntimeError(f"input of shape {tuple(x.shape)}, parameters of {tuple(self.params.shape)}")
        count = len(x)
        padded = -(-count // BATCH_SIZE_GRANULARITY) * BATCH_SIZE_GRANULARITY
        x = nn.functional.pad(x.float(), [0, 0, 0, padded - count])
        tables = self.params.float().view(-1, self.features).split([size for *_, size in self.levels])
        levels = zip(self.levels, tables)
        features = [_interpolate(x, table, *level) for level, table in levels]
        return torch.cat(features, 1)[:count].to(self.dtype or torch.float16)


def _level(config: dict[str, Any], level: int) -> tuple[float, int, int]:
    """Scale, nodes a side and table entries (`grid_scale`, `grid_resolution`, GridEncodingTemplated)."""
    exponent = torch.tensor(level * math.log2(config["per_level_scale"]), dtype=torch.float32)
    scale = (torch.exp2(exponent) * config["base_resolution"] - 1).item()
    nodes = math.ceil(scale) + 1
    return scale, nodes, min(-(-(nodes**3) // 8) * 8, 2 ** config["log2_hashmap_size"])


def _interpolate(x: Tensor, table: Tensor, scale: float, nodes: int, size: int) -> Tensor:
    """`kernel_grid`: trilinear features (N, F) of positions (N, 3)."""
    position = x * scale + 0.5
    low = position.floor()
    fraction, low = position - low, low.long()
    features = torch.zeros(len(x), table.shape[1], device=x.device)
    for corner in range(8):
        sides = [corner >> axis & 1 for axis in range(3)]
        weights = [fraction[:, axis] if side else 1 - fraction[:, axis] for axis, side in enumerate(sides)]
        index = _grid_index([(low[:, axis] + side) & UINT32 for axis, side in enumerate(sides)], nodes, size)
        features = features + (weights[0] * weights[1] * weights[2])[:, None] * table[index]
    return features


def _grid_index(position: list[Tensor], nodes: int, size: int) -> Tensor:
    """`grid_index`: dense as far as the table reaches, else hashed; both modulo the table's size."""
    stride, index = 1, torch.zeros_like(position[0])
    for axis in position:
        if stride > size:
            break
        index = index + axis * stride
        stride *= nodes
    if size < stride:
        hashed = [axis * prime & UINT32 for axis, prime in zip(position, PRIMES)]
        index = hashed[0] ^ hashed[1] ^ hashed[2]
    return (index & UINT32) % size
