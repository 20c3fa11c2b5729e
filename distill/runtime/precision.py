"""The dtype of a run: of its frozen networks' weights, and of the arithmetic of the networks it trains."""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch.amp import GradScaler

from distill.runtime.errors import UserError
from distill.runtime.machine import pick_device

PrecisionName = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: dict[PrecisionName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Precision:
    """A device, and the dtype that networks compute in on it.

    Frozen networks have weights of `dtype`. Trained ones keep float32 weights and optimizer states and run
    inside `autocast`, since half-precision weights lose small updates (Micikevicius et al. 2018,
    arXiv:1710.03740).
    """

    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> PrecisionName:
        """The name of its dtype."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def autocast(self) -> torch.autocast:
        """The context of a trained network's forward pass; without effect in float32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)

    def scaler(self) -> GradScaler | None:
        """The loss scaling that float16 gradients need; None for the other dtypes."""
        if self.dtype != torch.float16:
            return None
        # Updates that overflow are skipped, the first ones on purpose; torch takes that for a wrong order.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        return GradScaler(self.device.type)


def pick_precision(device: str, precision: PrecisionName) -> Precision:
    """The precision that the options `device` and `precision` name. Raises `UserError`."""
    return resolve_precision(precision, pick_device(device))


def resolve_precision(name: PrecisionName, device: torch.device) -> Precision:
    """The precision of a name on a device.

    `auto` is bfloat16 on a CUDA device that computes in it, float16 on an older one, and float32 on a CPU.
    Raises `UserError` for an unknown name and for a dtype that the device does not compute in.
    """
    cuda = device.type == "cuda"
    bfloat16 = not cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "float32" if not cuda else "bfloat16" if bfloat16 else "float16"
    if name not in DTYPES:
        raise UserError(f"precision is '{name}': expected auto, {', '.join(DTYPES)}")
    if name == "bfloat16" and not bfloat16:
        raise UserError(f"{torch.cuda.get_device_name(device)} does not compute in bfloat16: use float16")
    return Precision(device, DTYPES[name])
