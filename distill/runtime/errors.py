"""The one exception that a user's mistake raises, and the allocation failures that count as one."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

_ALLOCATION_MESSAGES = re.compile(
    "allocate memory|out of memory|not enough memory|ALLOC_FAILED|Storage size calculation overflowed"
    "|Overflow when unpacking|too large to convert|index-sized integer|Maximum allowed dimension"
)
# Options by which less memory is used, the most useful first: what to set them to, and where that is smaller.
_SMALLER: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "gradient_checkpointing": ("{}=true", lambda value: not value),
    "precision": ("{}=bfloat16", lambda value: value in ("auto", "float32")),
    "rays_per_chunk": ("{}=4096", lambda value: value is None or value > 4096),
    "accumulate": ("a higher {}", lambda value: True),
    **dict.fromkeys(
        ("batch", "views", "particles", "resolution", "count", "samples"),
        ("a lower {}", lambda value: isinstance(value, int) and value > 1),
    ),
}
MAX_REMEDIES = 6


class UserError(ValueError):
    """A mistake in the user's input: one sentence with the value, what was expected and the fix."""


def allocation_error(error: BaseException, options: object = None) -> UserError | None:
    """The `UserError` for a failed allocation of Python, NumPy or torch; None for any other exception.

    It names those of `options`, a dataclass of nested ones, by which less memory is used. On CUDA torch
    raises `OutOfMemoryError`, on the CPU a plain `RuntimeError`, and a number beyond 64 bits is a
    `TypeError` or `OverflowError`, so all are recognised by their messages.
    """
    if not isinstance(error, MemoryError) and not _ALLOCATION_MESSAGES.search(str(error)):
        return None
    size = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
    reason = size[0] if size else next(iter(str(error).splitlines()), "out of memory")
    device = " on the GPU" if "CUDA" in str(error) else ""
    advice = memory_advice(options, cuda=bool(device))
    return UserError(f"not enough memory{device} for these options ({reason[:200]}): try {advice}")


def memory_advice(options: object, cuda: bool) -> str:
    """What to set of nested options, so that less memory is used."""
    return ", ".join(_remedies(options, cuda)) or "a lower count, batch or resolution"


def _remedies(options: object, cuda: bool) -> list[str]:
    """What to set of nested options, the most useful first and the outermost of equal ones."""
    order = list(_SMALLER)
    leaves = sorted(_leaves(options), key=lambda leaf: (order.index(leaf[1]), leaf[0].count(".")))
    remedies = []
    for path, name, value in leaves:
        advice, applies = _SMALLER[name]
        halved = name == "precision" and value == "auto" and cuda
        if applies(value) and not halved:
            remedies.append(advice.format(path))
    return remedies[:MAX_REMEDIES]


def _leaves(options: object, path: str = "") -> Iterator[tuple[str, str, object]]:
    """Path, name and value of the options that have an entry in `_SMALLER`."""
    if not dataclasses.is_dataclass(options) or isinstance(options, type):
        return
    for field in dataclasses.fields(options):
        value, inner = getattr(options, field.name), f"{path}{field.name}"
        if field.name in _SMALLER:
            yield inner, field.name, value
        yield from _leaves(value, f"{inner}.")
