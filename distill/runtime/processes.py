"""Data-parallel training in several processes (torchrun). Every function also serves a single process.

torchrun --nproc-per-node 2 scripts/distill_one_step.py distill.accumulate=2
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

BUCKET = 2**25  # elements that are averaged in one collective operation


def init() -> None:
    """Join the process group that torchrun announces; no effect in a single process or on a second call."""
    if world_size() == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def world_size() -> int:
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The index of this process; rank 0 writes files."""
    return distributed.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait until all processes have arrived."""
    if world_size() > 1:
        distributed.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The first process runs the block before the others, which then find what it has cached."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def all_reduce_max(value: int) -> int:
    """The maximum of a value over all processes."""
    if world_size() == 1:
        return value
    maximum = torch.tensor([value], device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(maximum, distributed.ReduceOp.MAX)
    return int(maximum)


def average_gradients(optimizer: Optimizer) -> None:
    """Replace the gradients of its parameters by their mean over all processes."""
    if world_size() == 1:
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        distributed.all_reduce(flat)
        means = (flat / world_size()).split([gradient.numel() for gradient in bucket])
        for gradient, mean in zip(bucket, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of together about `BUCKET` elements: their copies take memory of their own."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(value.numel() for value in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
