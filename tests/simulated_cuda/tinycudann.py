"""In place of tinycudann: its grid encoding (native/grid_encoding.cpp) behind its torch bindings."""

import math
from typing import Any

import torch
from torch import Tensor, nn

BATCH_SIZE_GRANULARITY = 256


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, params: Tensor, *grid: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.grid = grid
        return torch.ops.simulated_cuda.encode(x, params, *grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_params = torch.ops.simulated_cuda.encode_backward(x, grad.contiguous(), *ctx.grid)
        return None, grad_params, *(None for _ in ctx.grid)


class Encoding(nn.Module):
    """`tinycudann.Encoding` of otype HashGrid for positions (N, 3): features (N, levels * features).

    Positions get no gradient.
    """

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
        self.scales = [_scale(config, level) for level in range(config["n_levels"])]
        nodes = [math.ceil(scale) + 1 for scale in self.scales]
        self.sizes = [min(-(-(n**3) // 8) * 8, 2 ** config["log2_hashmap_size"]) for n in nodes]
        values = torch.rand(sum(self.sizes) * self.features, generator=torch.Generator().manual_seed(seed))
        self.params = nn.Parameter(((values * 2 - 1) * 1e-4).cuda())

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            raise RuntimeError("TCNN WARNING: input must be a CUDA tensor, but isn't")
        if x.ndim != 2 or x.shape[1] != self.n_input_dims or self.params.ndim != 1:
            raise RuntimeError(f"input of shape {tuple(x.shape)}, parameters of {tuple(self.params.shape)}")
        padded = -(-len(x) // BATCH_SIZE_GRANULARITY) * BATCH_SIZE_GRANULARITY
        positions = nn.functional.pad(x.detach().float(), [0, 0, 0, padded - len(x)]).contiguous()
        params = self.params.float().contiguous()
        output = _Encode.apply(positions, params, self.sizes, self.scales, self.features)
        return output[: len(x)].to(self.dtype or torch.float16)


def _scale(config: dict[str, Any], level: int) -> float:
    """`grid_scale`, in float32."""
    exponent = torch.tensor(level * math.log2(config["per_level_scale"]), dtype=torch.float32)
    return (torch.exp2(exponent) * config["base_resolution"] - 1).item()
