"""Allocation failures as user errors."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from distill.runtime.errors import UserError, allocation_error
from distill.runtime.run import RunOptions

CUDA = "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1"

CUDNN = "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"
CPU = "can't allocate memory: you tried to allocate 3221225472 bytes. Error code 12 (Cannot allocate memory)"


@dataclass(frozen=True)
class Training:
    """Options of a training."""

    batch: int = 64
    accumulate: int = 1
    ema: float = 0.999


@dataclass(frozen=True)
class Rendering:
    """Options of renders."""

    resolution: int = 512
    rays_per_chunk: int | None = None


@dataclass(frozen=True)
class Recipe:
    """Nested options, as a script's."""

    run: RunOptions
    distill: Training = field(default_factory=Training)
    render: Rendering = field(default_factory=Rendering)


RECIPE = Recipe(RunOptions("out"))


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(10**18),
        lambda: torch.empty(10**10, 10**10),
        lambda: torch.zeros(4).repeat(10**17, 1),
        lambda: torch.empty(10**30),
        lambda: np.zeros(10**17),
        lambda: [0] * 10**17,
        lambda: [0] * 10**30,
    ],
)
def test_failed_allocation_is_a_user_error(allocate: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError, TypeError, OverflowError)) as failure:
        allocate()
    error = allocation_error(failure.value)
    assert isinstance(error, UserError)
    assert "not enough memory" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), TypeError("no int"), ValueError("x"), KeyError()]
)
def test_other_exceptions_are_no_allocation_error(error: Exception) -> None:
    assert allocation_error(error) is None


@pytest.mark.parametrize("message", [CUDA, CUDNN, CPU])
def test_the_options_that_help_are_named(message: str) -> None:
    error = str(allocation_error(torch.OutOfMemoryError(message), RECIPE))
    assert "run.gradient_checkpointing=true" in error and "a higher distill.accumulate" in error
    assert "a lower distill.batch" in error and "a lower render.resolution" in error
    assert "render.rays_per_chunk=4096" in error and "ema" not in error and "\n" not in error
    assert ("Tried to allocate 3.00 GiB" in error) == (message is CUDA)


def test_options_that_are_set_already_are_not_named() -> None:
    run = replace(RECIPE.run, gradient_checkpointing=True, precision="bfloat16")
    small = replace(RECIPE, run=run, distill=Training(batch=1), render=Rendering(1, 1024))
    error = str(allocation_error(MemoryError(), small))
    for name in ("gradient_checkpointing", "precision", "distill.batch", "resolution", "rays_per_chunk"):
        assert name not in error
    assert "distill.accumulate" in error


def test_half_precision_is_advised_where_it_is_not_chosen() -> None:
    """On CUDA it is the default, on a CPU it is not."""
    in_float32 = replace(RECIPE, run=replace(RECIPE.run, precision="float32"))
    advice = "run.precision=bfloat16"
    assert advice not in str(allocation_error(RuntimeError(CUDA), RECIPE))
    assert advice in str(allocation_error(RuntimeError(CUDA), in_float32))
    assert advice in str(allocation_error(MemoryError(), RECIPE))
