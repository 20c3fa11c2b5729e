"""The one exception that a user's mistake raises, and the allocation failures that count as one."""

import re

_ALLOCATION_MESSAGES = re.compile(
    "allocate memory|out of memory|not enough memory|Storage size calculation overflowed"
    "|Overflow when unpacking|too large to convert|index-sized integer|Maximum allowed dimension"
)


class UserError(ValueError):
    """A mistake in the user's input: one sentence with the value, what was expected and the fix."""


def allocation_error(error: BaseException) -> UserError | None:
    """The `UserError` for a failed allocation of Python, NumPy or torch; None for any other exception.

    torch raises a plain `RuntimeError` on the CPU, and a number beyond 64 bits is a `TypeError` or
    `OverflowError`, so these are recognised by their messages.
    """
    if not isinstance(error, MemoryError) and not _ALLOCATION_MESSAGES.search(str(error)):
        return None
    size = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
    reason = size[0] if size else next(iter(str(error).splitlines()), "out of memory")
    return UserError(
        f"not enough memory for these options ({reason}): lower a count, a batch or a resolution"
    )
