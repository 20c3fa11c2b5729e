"""What a run shows and states: image grids, trackers, memory, machine, versions."""

import datetime
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.data import atomic_path
from distill.errors import UserError
from distill.names import slug

PACKAGES = ("torch", "numpy", "diffusers", "transformers", "safetensors", "accelerate", "nerfacc", "trimesh")


def image_grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Images (B, 3, H, W) in rows of `columns`, white gaps of `gap` pixels between, as one (3, H', W')."""
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise UserError(f"images have the shape {tuple(images.shape)}; expected (B, 3, H, W) with B > 0")
    images = images.detach().float().cpu()
    count, _, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return grid


def to_bytes(images: Tensor) -> np.ndarray:
    """(..., H, W, 3) of 0 to 255 from images (..., 3, H, W) in [0, 1]; values beyond are clamped, what is no number is 0."""
    levels = images.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    return levels.movedim(-3, -1).contiguous().cpu().numpy()


def save_png(path: Path | str, image: Tensor) -> None:
    """Write an image (3, H, W) in [0, 1] as `to_bytes` takes it, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(to_bytes(image)).save(temporary)


class Trackers:
    """TensorBoard and its like through accelerate, which is imported only where one is asked for."""

    def __init__(self, names: Sequence[str], directory: Path) -> None:
        """Raises `UserError` for a tracker that accelerate does not know or that is not installed."""
        self._directory = directory
        self._names = tuple(names)
        self._accelerator: Any = None
        if self._names:
            _check_installed(self._names)

    def start(self, label: str, step: int) -> None:
        """Open the trackers at a step; what TensorBoard holds beyond it, of a killed session, is hidden."""
        if not self._names:
            return
        from accelerate import Accelerator

        self._accelerator = Accelerator(log_with=list(self._names), project_dir=str(self._directory))
        self._accelerator.init_trackers(slug(label), init_kwargs={"tensorboard": {"purge_step": step + 1}})

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Hand figures to every tracker."""
        if self._accelerator is not None:
            self._accelerator.log(dict(figures), step=step)

    def close(self) -> None:
        """Flush and close."""
        if self._accelerator is not None:
            self._accelerator.end_training()
            self._accelerator = None


def _check_installed(names: Sequence[str]) -> None:
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ImportError:
        raise UserError(f"tracker '{names[0]}' needs accelerate: pip install it, or trackers=[]") from None
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    present = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UserError(f"tracker '{name}' is unknown; expected some of {', '.join(known)}, or []")
        if name not in present:
            raise UserError(f"the tracker '{name}' is not installed; pip install {name}, or trackers=[]")


def pick_device(name: str) -> torch.device:
    """The device of a name, `auto` being CUDA where there is one. Raises `UserError` where it is absent."""
    if name == "auto":
        here = int(os.environ.get("LOCAL_RANK", "0"))  # of several processes each has its own
        return torch.device("cuda", here) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"the device is '{name}'; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"the device is '{name}', but torch sees no CUDA; use auto or cpu")
    return device


def peak_memory() -> dict[str, float]:
    """Peak memory of this process in MiB, and of the GPU where one is in use."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # Linux counts KiB
    peak = {"peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)}
    if torch.cuda.is_initialized():
        peak["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak


def machine_facts() -> dict[str, Any]:
    """Hardware, date, versions and commit, as JSON values."""
    return {
        "hardware": _hardware(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }


def _hardware() -> str:
    processor = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        named = re.search(r"^model name\s*:\s*(.+)$", listing.read_text(errors="replace"), re.MULTILINE)
        processor = named.group(1) if named else processor
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
    """The commit of the code's checkout, marked when it has changes; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
