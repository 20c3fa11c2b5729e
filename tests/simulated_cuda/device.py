"""Turns the simulated device on in this process, which must not have imported torch yet; its counters.

It lasts as long as the process: torch looks for CUDA once, when it is imported.
"""

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from simulated_cuda.build import libraries

GIB = 2**30
OnWait = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


class Device:
    """The counters of the simulated device, and its memory's size."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("allocated", "peak", "uploaded", "downloaded"):
            self._function(name).restype = ctypes.c_int64
        self._function("counts").restype = ctypes.c_char_p
        self._function("limit").argtypes = [ctypes.c_int64]
        self._function("seed").argtypes = [ctypes.c_uint64]
        self._memory = 64 * GIB
        self._on_wait = OnWait()  # kept: the library calls it

    def _function(self, name: str) -> Any:
        return getattr(self._library, f"simulated_cuda_{name}")

    @property
    def memory(self) -> int:
        """Bytes of device memory; to allocate more raises `torch.OutOfMemoryError`."""
        return self._memory

    @memory.setter
    def memory(self, value: int) -> None:
        self._memory = value
        self._function("limit")(value)

    def kernels(self) -> dict[str, int]:
        """How often each operator ran. `foreach` operators count once, views not at all."""
        return self._counts(False)

    def waits(self) -> dict[str, int]:
        """How often the host waited for the device, by the reason."""
        return self._counts(True)

    def _counts(self, of_waits: bool) -> dict[str, int]:
        lines = self._function("counts")(of_waits).decode().splitlines()
        return {name: int(count) for name, count in (line.split("\t") for line in lines)}

    def uploaded(self) -> int:
        """Bytes copied to the device."""
        return self._function("uploaded")()

    def downloaded(self) -> int:
        """Bytes copied to the host."""
        return self._function("downloaded")()

    def allocated(self) -> int:
        """Bytes of device memory in use."""
        return self._function("allocated")()

    def peak(self) -> int:
        """The most bytes of device memory that were in use since `reset_peak`."""
        return self._function("peak")()

    def reset_counts(self) -> None:
        """Kernels, waits and copied bytes from zero."""
        self._function("reset_counts")()

    def reset_peak(self) -> None:
        """The peak from what is in use now."""
        self._function("reset_peak")()

    def seed(self, seed: int) -> None:
        """Seed the default generator."""
        self._function("seed")(seed % 2**64)

    @contextmanager
    def on_wait(self, callback: Callable[[str], None]) -> Iterator[None]:
        """Call back with the reason of each wait, on the thread that waits."""
        self._on_wait = OnWait(lambda reason: callback(reason.decode()))
        self._function("on_wait")(self._on_wait)
        try:
            yield
        finally:
            self._function("on_wait")(None)


@cache
def activate() -> Device:
    """The device, built on the first call; the same one later.

    Environment variables: SIMULATED_CUDA_MEMORY_GIB (64), SIMULATED_CUDA_BFLOAT16 (1; 0 is a device without
    it), SIMULATED_CUDA_NERFACC and SIMULATED_CUDA_TINYCUDANN (1; 0 leaves the library's kernels out). Raises
    `Unavailable` where it cannot be built, `RuntimeError` when torch was imported before.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the simulated device must be activated before torch is imported")
    library, nerfacc_kernels = libraries()
    device = Device(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
    device.memory = int(float(os.environ.get("SIMULATED_CUDA_MEMORY_GIB", 64)) * GIB)

    from simulated_cuda import tinycudann
    from simulated_cuda.torch_cuda import install

    install(device, bfloat16=_enabled("BFLOAT16"))
    if nerfacc_kernels is not None and _enabled("NERFACC"):
        _load_nerfacc_kernels(nerfacc_kernels)
    if _enabled("TINYCUDANN"):
        tinycudann.__spec__ = importlib.machinery.ModuleSpec("tinycudann", None)
        sys.modules["tinycudann"] = tinycudann
    return device


def _enabled(name: str) -> bool:
    return os.environ.get(f"SIMULATED_CUDA_{name}", "1") != "0"


def _load_nerfacc_kernels(path: Path) -> None:
    """As `nerfacc.csrc`, where nerfacc looks for what its own set-up has built."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    sys.modules["nerfacc.csrc"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
