"""Deferred SIGTERM and SIGINT: a run ends after a step, with a checkpoint."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class SignalFlag:
    """The number of the received signal, 0 for none."""

    number: int = 0


@contextmanager
def deferred_signals(label: str) -> Iterator[SignalFlag]:
    """Within the context, SIGTERM and SIGINT only set the flag and print a message; a second signal kills.

    Outside the main thread, which alone may set handlers, signals are not deferred.
    """
    flag = SignalFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(number: int, frame: FrameType | None) -> None:
        flag.number = number
        for other in previous:
            signal.signal(other, signal.SIG_DFL)
        name = signal.Signals(number).name
        message = f"\n{label}: {name}: stops with a checkpoint after this step; a second one kills\n"
        os.write(2, message.encode())  # print is not reentrant

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
