"""Allocation failures as user errors."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from distill.runtime.errors import UserError, allocation_error


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
