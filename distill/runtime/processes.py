"""Several processes of one training (torchrun): who is who, and what they must agree on. A single process needs nothing of it.

torchrun --nproc-per-node 2 scripts/distill_one_step.py distill.accumulate=2
"""

import os
from typing import Any

import torch
from torch import distributed


def join() -> None:
    """Join the group that torchrun has announced, through accelerate; does nothing in a single process or a second time."""
    if count() == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 writes files."""
    return distributed.get_rank() if count() > 1 else 0


def wait() -> None:
    """Until all have come here."""
    if count() > 1:
        distributed.barrier()


def largest(value: int) -> int:
    """The largest of all processes' values."""
    if count() == 1:
        return value
    told = torch.tensor([value], device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(told, distributed.ReduceOp.MAX)
    return int(told)


def share_gradients(optimizer: torch.optim.Optimizer) -> None:
    """From now on every step of the optimizer is made with the mean of all processes' gradients."""
    if count() > 1:
        optimizer.register_step_pre_hook(_average)


def _average(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    parts = (flat / count()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
