"""Data-parallel training in several processes (torchrun). Every function also serves a single process.

torchrun --nproc-per-node 2 scripts/distill_one_step.py distill.accumulate=2
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, distributed

from distill.runtime.errors import UserError

_split = False  # whether random numbers are drawn for the rows of all processes


def init() -> None:
    """Join the process group that torchrun announces; no effect in a single process or on a second call.

    What other processes than the first print to stdout is dropped.
    """
    if world_size() == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends


def join(script: str, parallel: bool) -> None:
    """Join torchrun's process group, for a script that is `parallel`. Raises `UserError` for another one."""
    if not parallel:
        raise UserError(
            f"{script} runs in one process: start it by python scripts/{script}.py, without torchrun"
        )
    init()


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


@dataclass(frozen=True)
class LocalRows:
    """Rows of a batch that one process computes at a time, and the weight of their mean loss.

    Summed over a process's rows and averaged over the processes, the weighted means are the mean over the
    whole batch.
    """

    rows: slice
    weight: float


def check_accumulate(accumulate: int, batch: int) -> None:
    """Raise `UserError` where a batch has too few rows for its parts in all processes."""
    if not 1 <= accumulate * world_size() <= batch:
        raise UserError(
            f"accumulate is {accumulate} with {world_size()} processes: expected 1 or more parts each, and "
            f"no more in all than the {batch} rows of a batch"
        )


def local_rows(count: int, accumulate: int = 1, group: int = 1) -> list[LocalRows]:
    """This process's rows of `count` rows, in `accumulate` parts of about equal size.

    Every `group` consecutive rows stay together. Parts are empty, and left out, where there are too few rows.
    """
    groups, parts = count // group, accumulate * world_size()
    first = rank() * accumulate
    bounds = [groups * part // parts * group for part in range(first, first + accumulate + 1)]
    slices = [slice(low, high) for low, high in pairwise(bounds) if high > low]
    return [LocalRows(rows, (rows.stop - rows.start) * world_size() / count) for rows in slices]


def equal_rows(count: int, option: str, group: int = 1) -> slice:
    """This process's rows of `count`: whole groups of `group`, as many as every other process has.

    The mean over all rows is then the mean over the processes. Raises `UserError`, which names the option
    that gives the count, where there is no such split.
    """
    processes = world_size()
    if count % (group * processes):
        groups = f" in groups of {group}" if group > 1 else ""
        raise UserError(
            f"{option} is {count}{groups}: {processes} processes cannot split that equally, "
            f"give a multiple of {group * processes}"
        )
    size = count // processes
    return slice(rank() * size, (rank() + 1) * size)


@contextmanager
def split_rows() -> Iterator[None]:
    """Within it each process computes equally many rows of one batch, for which `draw_rows` draws."""
    global _split
    before, _split = _split, True
    try:
        yield
    finally:
        _split = before


def draw_rows(draw: Callable[[int], Tensor], count: int) -> Tensor:
    """`count` rows of random numbers, `draw(count)`; within `split_rows` those of this process's rows.

    There every process draws the numbers of the whole batch, so that generators stay equal in all of them
    and rows have the numbers that they would have in a single process.
    """
    if not _split or world_size() == 1:
        return draw(count)
    return draw(count * world_size())[rank() * count : (rank() + 1) * count]


def own_generator(generator: torch.Generator) -> torch.Generator:
    """A new generator, another one in every process, for draws whose number depends on its rows.

    `generator`, whose state is the seed, stays as it is, so that it remains equal in all processes.
    """
    own = torch.Generator(generator.device)
    own.set_state(generator.get_state())
    seed = int(torch.randint(2**31, (), generator=own, device=generator.device))
    return own.manual_seed(seed + rank())


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of the tensors of all processes, in place."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def all_reduce_max(value: int) -> int:
    """The maximum of a value over all processes."""
    if world_size() == 1:
        return value
    maximum = torch.tensor([value], device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(maximum, distributed.ReduceOp.MAX)
    return int(maximum)
