"""torch.cuda's Python side for the simulated device: what a CPU-only build of torch leaves out."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simulated_cuda.device import Device

NAME = "simulated CUDA device"
NOTHING_TO_DO = ("_lazy_init", "init", "set_device", "synchronize", "empty_cache", "ipc_collect")


class Event:
    """`torch.cuda.Event`: everything enqueued before has run."""

    def __init__(self, **_: Any) -> None:
        self._time = 0.0

    def record(self, stream: object = None) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end._time - self._time)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def wait(self, stream: object = None) -> None: ...


class Stream:
    """`torch.cuda.Stream`: the only one."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None: ...


def install(device: Device, bfloat16: bool) -> None:
    """Replace what torch.cuda cannot answer here; bfloat16: whether the device computes in it."""
    replacements = {
        **_queries(device, bfloat16),
        **_memory(device),
        **_random(device),
        **{name: _no_op() for name in NOTHING_TO_DO},
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": lambda stream: stream,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.UntypedStorage.clone = _clone
    torch.UntypedStorage.to = _to
    _compile_as_eager()


def _no_op() -> Callable[..., None]:
    """Each a function of its own: dynamo refuses one function under two names."""
    return lambda *_, **__: None


def _queries(device: Device, bfloat16: bool) -> dict[str, Callable[..., Any]]:
    capability = (9, 0) if bfloat16 else (7, 5)
    properties = {"name": NAME, "major": capability[0], "minor": capability[1], "multi_processor_count": 1}
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda _=None: SimpleNamespace(total_memory=device.memory, **properties),
        "is_bf16_supported": lambda including_emulation=True: bfloat16 or including_emulation,
        "is_current_stream_capturing": lambda: False,
    }


def _memory(device: Device) -> dict[str, Callable[..., Any]]:
    def statistics(_: object = None) -> dict[str, int]:
        kinds = {"current": device.allocated(), "peak": device.peak()}
        pools = ("allocated_bytes", "reserved_bytes")
        return {f"{pool}.all.{kind}": value for pool in pools for kind, value in kinds.items()}

    return {
        "memory_allocated": lambda _=None: device.allocated(),
        "memory_reserved": lambda _=None: device.allocated(),
        "max_memory_allocated": lambda _=None: device.peak(),
        "max_memory_reserved": lambda _=None: device.peak(),
        "memory_stats": statistics,
        "mem_get_info": lambda _=None: (device.memory - device.allocated(), device.memory),
        "reset_peak_memory_stats": lambda _=None: device.reset_peak(),
    }


def _random(device: Device) -> dict[str, Callable[..., Any]]:
    def state(_: object = "cuda") -> Tensor:
        return torch.ops.simulated_cuda.random_state()

    def set_state(state: Tensor, _: object = "cuda") -> None:
        torch.ops.simulated_cuda.set_random_state(state)

    return {
        "manual_seed": lambda seed: device.seed(int(seed)),
        "manual_seed_all": lambda seed: device.seed(int(seed)),
        "get_rng_state": state,
        "set_rng_state": set_state,
        "get_rng_state_all": lambda: [state()],
        "set_rng_state_all": lambda states: set_state(states[0]),
    }


_cpu_clone, _cpu_to = torch.UntypedStorage.clone, torch.UntypedStorage.to


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """For `copy.deepcopy`: torch makes a CUDA storage in code that a CPU-only build leaves out."""
    return _bytes(storage).clone().untyped_storage() if storage.device.type == "cuda" else _cpu_clone(storage)


def _to(
    storage: torch.UntypedStorage, *, device: torch.device, non_blocking: bool = False
) -> torch.UntypedStorage:
    """For `torch.load`, as `_clone`."""
    if "cuda" not in (storage.device.type, torch.device(device).type):
        return _cpu_to(storage, device=device, non_blocking=non_blocking)
    return _bytes(storage).to(device, non_blocking=non_blocking).untyped_storage()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _compile_as_eager() -> None:
    """Inductor cannot compile for the device: compiled code runs as it is."""

    def compiled(model: Any = None, **_: Any) -> Any:
        return model if model is not None else lambda function: function

    torch.compile = compiled
    torch.nn.Module.compile = _no_op()
