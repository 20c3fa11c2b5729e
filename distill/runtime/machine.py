"""The machine: device, memory, hardware, versions."""

import datetime
import math
import os
import platform
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from distill.runtime.errors import UserError

PACKAGES = ("torch", "numpy", "diffusers", "transformers", "safetensors", "accelerate", "nerfacc", "trimesh")


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto` is CUDA where available, each of several processes' own.

    On CUDA, float32 matrix products then use TF32, with 10 bits of mantissa, as convolutions do by default.
    Raises `UserError` for an unavailable device.
    """
    own = os.environ.get("LOCAL_RANK", "0")
    text = name if name != "auto" else f"cuda:{own}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"the device is '{name}'; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        _check_cuda(name, device)
        torch.set_float32_matmul_precision("high")
    return device


def _check_cuda(name: str, device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise UserError(f"the device is '{name}', but torch sees no CUDA; use auto or cpu")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        available = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        chosen = f" ({device}, by this process's LOCAL_RANK)" if name == "auto" else ""
        raise UserError(f"the device is '{name}'{chosen}; this machine has {available}")


def use_deterministic_algorithms() -> None:
    """Choose deterministic kernels where torch has them, and warn where an operator has none (CUDA)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in any order
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def peak_memory() -> dict[str, float]:
    """Peak memory of this process in MiB, and of the GPU where one is in use."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    peak = {"peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)}
    if torch.cuda.is_initialized():
        peak["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak


def available_memory(device: torch.device) -> float:
    """Bytes that can be allocated now: of a CUDA device's memory, else of the host's; infinite if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if meminfo.exists() else ""
    match = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    return math.inf if match is None else 1024.0 * int(match[1])


def machine_info() -> dict[str, Any]:
    """Hardware, date, versions and commit, as JSON values."""
    return {
        "hardware": _hardware(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }


def _hardware() -> str:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        processor = match.group(1) if match else processor
    parts = [f"{os.cpu_count()} x {processor}", f"{torch.get_num_threads()} torch threads"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """The commit of this checkout, with `-dirty` where it has changes; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
