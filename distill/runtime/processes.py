"""Data-parallel training in several processes (torchrun). Every function also serves a single process.

torchrun --nproc-per-node 2 scripts/distill_one_step.py distill.accumulate=2
"""

import os
from typing import Any

import torch
from torch import distributed
from torch.optim import Optimizer


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


def all_reduce_max(value: int) -> int:
    """The maximum of a value over all processes."""
    if world_size() == 1:
        return value
    maximum = torch.tensor([value], device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(maximum, distributed.ReduceOp.MAX)
    return int(maximum)


def average_gradients(optimizer: Optimizer) -> None:
    """Replace the gradients by their mean over all processes before every step of the optimizer."""
    if world_size() > 1:
        optimizer.register_step_pre_hook(_all_reduce_gradients)


def _all_reduce_gradients(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    means = (flat / world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
