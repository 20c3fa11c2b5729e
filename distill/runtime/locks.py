"""Locks on files and folders, which end with the process that holds them, however it ends."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def lock(path: Path) -> Callable[[], None] | None:
    """Lock an existing file or folder; returns the release, safe to call twice, or None where it is locked.

    flock: between processes of one machine, and of several on a file system that passes it on (NFS version 4,
    Lustre with the option flock).
    """
    descriptors = [os.open(path, os.O_RDONLY)]

    def release() -> None:
        while descriptors:
            os.close(descriptors.pop())

    try:
        fcntl.flock(descriptors[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        release()
        return None
    return release


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone holds the lock file `path`, which is made where it is missing, inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    release = lock(path)
    try:
        yield release is not None
    finally:
        if release is not None:
            release()
