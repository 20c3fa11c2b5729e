"""Copies to a device: equal values, dtypes and shapes, packed into one transfer on CUDA."""

import pytest
import torch
from torch import Tensor

from distill.runtime.transfer import upload, upload_all


def mixed_values() -> list[Tensor]:
    """Of odd sizes and several dtypes, one of them empty, a scalar, and one not contiguous."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand(3, 1, generator=generator),
        torch.arange(5),
        torch.zeros(0, 4),
        torch.tensor(True),
        torch.rand(4, 3, generator=generator, dtype=torch.float64).t(),
        torch.rand(7, generator=generator).bfloat16(),
    ]


def test_tensors_on_their_device_are_not_copied() -> None:
    values = mixed_values()
    assert all(a is b for a, b in zip(values, upload_all(values, "cpu"), strict=True))
    assert upload(values[0], torch.device("cpu")) is values[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: uploads are unchecked")
def test_packed_copies_equal_their_sources() -> None:
    values = mixed_values()
    copies = upload_all(values, "cuda")
    assert len({copy.untyped_storage().data_ptr() for copy in copies if copy.numel()}) == 1
    for value, copy in zip(values, copies, strict=True):
        assert copy.is_cuda and copy.dtype == value.dtype
        assert torch.equal(copy.cpu(), value)
    assert upload(copies[1], "cuda") is copies[1]
