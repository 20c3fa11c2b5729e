"""SIGTERM and SIGINT are noted, for what runs to end where it can be resumed."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class SignalFlag:
    """The signal that came, 0 for none."""

    number: int = 0


@contextmanager
def noted_signals(label: str) -> Iterator[SignalFlag]:
    """SIGTERM and SIGINT are noted within, and said on stderr under `label`; a second one meets the default handler and kills."""
    noted = SignalFlag()
    if threading.current_thread() is not threading.main_thread():
        yield noted  # only the main thread may set handlers
        return

    def note(number: int, frame: FrameType | None) -> None:
        noted.number = number
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        said = f"{label}: {signal.Signals(number).name}: stops with a checkpoint after this step; a second one kills"
        os.write(2, f"\n{said}\n".encode())  # print is not reentrant

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
