"""Copies from host memory to a device that the host does not wait for."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; every dtype can be viewed at a multiple of it
PINNED = 2**28  # bytes; more are copied from where they are, as pinned memory is not given back


def upload(value: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device: through pinned memory from the host to CUDA, else as `Tensor.to`."""
    return upload_all([value], device)[0]


def upload_all(values: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Tensors on a device, of any shapes and dtypes; from the host to CUDA in one copy.

    A copy from pageable memory makes the host wait for the device, once a tensor. Here the values are packed
    into one pinned buffer, and the results are views of its copy. They are detached.
    """
    device = torch.device(device)
    sizes = [-(-value.nbytes // ALIGNMENT) * ALIGNMENT for value in values]
    on_host = all(value.device.type == "cpu" for value in values)
    if device.type != "cuda" or not on_host or sum(sizes) > PINNED:
        return [value.to(device) for value in values]

    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for part, value in zip(buffer.split(sizes), values, strict=True):
        _view(part, value).copy_(value.detach())
    # The caching host allocator keeps the buffer until the copy is done.
    copies = buffer.to(device, non_blocking=True).split(sizes)
    return [_view(part, value) for part, value in zip(copies, values, strict=True)]


def _view(part: Tensor, like: Tensor) -> Tensor:
    """The first bytes of `part` in the dtype and shape of another tensor."""
    return part[: like.nbytes].view(like.dtype).view(like.shape)
