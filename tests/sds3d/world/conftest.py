"""What the tests of the world share."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from sds3d.world import world


class InProcess:
    """In place of the pool of workers, so that most tests start no process."""

    def __init__(self, workers: int, mp_context: object, initializer: object, arguments: object) -> None:
        assert workers == 1
        assert (initializer, arguments) == (torch.set_num_threads, (1,))  # several would wait for each other

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def map(self, work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        return map(work, jobs)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "ProcessPoolExecutor", InProcess)
