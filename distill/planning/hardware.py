"""Machines, and the time and memory that recorded operations take on them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from distill.planning.operations import Operation, Record
from distill.planning.recorder import OPTIMIZER
from distill.runtime.errors import UserError

GIB = 2**30
HALF = (torch.bfloat16, torch.float16)
# Fractions of the peaks that kernels reach, and the seconds that a kernel takes at least when Python launches
# it. Assumed, not measured: no GPU has run this code. PaLM reports 46 % for a whole training (Chowdhery et
# al. 2022, arXiv:2204.02311, table 3), which includes its memory-bound parts.
COMPUTE_FRACTION, BANDWIDTH_FRACTION, LAUNCH = 0.6, 0.8, 8e-6
CONTEXT_GIB = 1.0  # assumed: CUDA's context and the workspaces of cuDNN and cuBLAS
FRAGMENTATION = 1.1  # assumed: what the caching allocator reserves over what is alive


@dataclass(frozen=True)
class Machine:
    """Peak rates in operations a second by dtype, of dense matrices, and bytes a second; seconds by operation
    where they were measured.
    """

    name: str
    half: float
    single: float  # of float32, as TF32 where there are tensor cores
    bandwidth: float
    memory: float  # bytes
    precision: torch.dtype = torch.bfloat16  # of `auto`
    measured: Mapping[Operation, float] = field(default_factory=dict)

    @property
    def accelerator(self) -> bool:
        """Whether it is one of the cards."""
        return self.name in CARDS

    def peak(self, dtype: torch.dtype) -> float:
        """Operations a second."""
        return self.half if dtype in HALF else self.single

    def seconds(self, operation: Operation, launch: float = LAUNCH) -> float:
        """As measured, else the roofline: whichever of arithmetic, memory and launch takes longest."""
        if operation in self.measured:
            return self.measured[operation]
        if operation.view:
            return 0.0
        compute = operation.flops / (self.peak(operation.dtype) * COMPUTE_FRACTION)
        return max(compute, operation.bytes / (self.bandwidth * BANDWIDTH_FRACTION), launch)

    def total(self, record: Record) -> Counter[tuple[str, str]]:
        """Seconds of all operations by component and direction; one launch updates all parameters."""
        seconds: Counter[tuple[str, str]] = Counter()
        for (component, direction, operation), count in record.operations.items():
            launch = 0.0 if component == OPTIMIZER else LAUNCH
            seconds[component, direction] += self.seconds(operation, launch) * count  # type: ignore[assignment]
        return seconds

    def floor(self, record: Record) -> float:
        """Seconds of the arithmetic alone at its peak rates."""
        counts: Counter[torch.dtype] = Counter()
        for (_, _, operation), count in record.operations.items():
            counts[operation.dtype] += operation.flops * count
        return sum(flops / self.peak(dtype) for dtype, flops in counts.items())

    def reserved(self, peak: float) -> float:
        """Bytes that a process needs where so many are alive at most."""
        return peak * FRAGMENTATION + CONTEXT_GIB * GIB if self.accelerator else peak


# Dense rates of the data sheets: theirs with sparsity are twice as high.
CARDS = {
    # https://www.nvidia.com/en-us/data-center/h100/: SXM, sparse 1,979 TFLOPS bf16 and 989 TF32, 3.35 TB/s
    "h100": Machine("h100", 989.5e12, 494.5e12, 3.35e12, 80e9),
    # https://www.nvidia.com/en-us/data-center/h200/: as the H100, 141 GB at 4.8 TB/s
    "h200": Machine("h200", 989.5e12, 494.5e12, 4.8e12, 141e9),
    # https://www.nvidia.com/en-us/data-center/a100/: 80 GB SXM, 312 TFLOPS bf16, 156 TF32, 2,039 GB/s
    "a100": Machine("a100", 312e12, 156e12, 2.039e12, 80e9),
    # NVIDIA Ada GPU architecture white paper: bf16 with float32 sums 165.2, TF32 82.6, 1,008 GB/s
    "4090": Machine("4090", 165.2e12, 82.6e12, 1.008e12, 24 * GIB),
}
HERE = "here"


def card(name: str) -> Machine:
    """A card of the table. Raises `UserError` for another name."""
    if name not in CARDS:
        raise UserError(f"machine is {name!r}: expected {HERE} or one of {', '.join(CARDS)}")
    return CARDS[name]
