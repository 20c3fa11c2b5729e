"""What torch's meta device lacks beside real ones: fused attention, autocast, convolutions' layout."""

from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from distill.planning.operations import tensors_in

aten = torch.ops.aten
# As CUDA's autocast: these compute in the low precision, those in float32.
LOW = {F.linear, F.conv1d, F.conv2d, torch.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__}
LOW |= {torch.bmm, torch.baddbmm, torch.addmm, F.scaled_dot_product_attention}
FULL = {F.group_norm, F.layer_norm, torch.group_norm, torch.layer_norm, F.softmax, torch.softmax, F.mse_loss}
IMAGE_KERNELS = {aten.convolution, aten.convolution_backward}
IMAGE_KERNELS |= {aten.native_group_norm, aten.native_group_norm_backward}


class _Autocast(torch.autocast):
    """The CPU's in place of the meta device's."""

    def __init__(
        self,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, dtype, enabled, cache_enabled)


class MetaFunctions(TorchFunctionMode):
    """Attention without its matrix, and autocast, neither of which the meta device has."""

    def __enter__(self) -> "MetaFunctions":
        self._patch = mock.patch.object(torch, "autocast", _Autocast)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patch.stop()

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is Tensor.backward:
            return _backward(args[0])
        if function not in LOW and function not in FULL:
            return function(*args, **kwargs)
        if any(tensor.is_meta for tensor in tensors_in(args)):
            if torch.is_autocast_enabled("cpu"):
                dtype = torch.get_autocast_dtype("cpu") if function in LOW else torch.float32
                args = [_cast(value, dtype) for value in args]
                kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
            if function is F.scaled_dot_product_attention:
                return _attention(*args, **kwargs)
        return function(*args, **kwargs)


def _backward(loss: Tensor) -> None:
    """The backward pass of a scalar inside the mode, which a call leaves: checkpoints compute again in it."""
    gradient = torch.ones_like(loss)
    with MetaFunctions():
        _engine_run_backward(
            (loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    mask = None if attn_mask is None else attn_mask.to(query.dtype)
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )[0]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    low = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if low else value


def is_channels_last(tensor: Tensor) -> bool:
    """Whether images (B, C, H, W) are stored as (B, H, W, C)."""
    contiguous = tensor.is_contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else False
    return contiguous and not tensor.is_contiguous()


def as_channels_last(result: Any) -> Any:
    """The layout of the results on every real device, which these kernels do not keep for meta."""
    if isinstance(result, tuple):
        return tuple(as_channels_last(item) for item in result)
    image = isinstance(result, Tensor) and result.dim() == 4
    return result.contiguous(memory_format=torch.channels_last) if image else result
