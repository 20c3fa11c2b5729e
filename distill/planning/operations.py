"""Operations with their operands' shapes, FLOPs and bytes, and records of them."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten


class TensorSpec(NamedTuple):
    """Shape, strides and dtype of an operand."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def span(self) -> int:
        """Elements of memory from the first to the last."""
        steps = [(size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True)]
        return 1 + sum(steps) if all(self.shape) else 0

    def empty(self, device: torch.device | str) -> Tensor:
        """Such a tensor, without values."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


@dataclass(frozen=True, eq=False)
class Operation:
    """A kernel with its operands; `args` and `kwargs` hold a `TensorSpec` for each tensor.

    flops count a multiplication and an addition as two; bytes are those of inputs and outputs.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    flops: int
    bytes: int
    dtype: torch.dtype
    view: bool  # no data is read or written
    in_place: bool  # the result is the first operand
    outputs: (
        tuple[TensorSpec | None, ...] | None
    )  # of new tensors alone; None where others are among the results

    def repeat(self) -> Any:
        """The results of the same operation again: new tensors."""
        assert self.outputs is not None
        tensors = tuple(None if spec is None else spec.empty("meta") for spec in self.outputs)
        return tensors if len(self.function._schema.returns) > 1 else tensors[0]


@dataclass
class Record:
    """What was computed: how often each operation, by component and direction; calls in samples."""

    operations: Counter[tuple[str, str, Operation]] = field(default_factory=Counter)
    samples: Counter[str] = field(default_factory=Counter)

    @property
    def flops(self) -> int:
        """Of everything."""
        return sum(operation.flops * count for (_, _, operation), count in self.operations.items())

    def scaled(self, factor: float) -> "Record":
        """So many of these."""
        operations = Counter({key: count * factor for key, count in self.operations.items()})
        samples = Counter({key: count * factor for key, count in self.samples.items()})
        return Record(operations, samples)

    def __add__(self, other: "Record") -> "Record":
        return Record(self.operations + other.operations, self.samples + other.samples)


def operation_of(
    key: tuple[Any, Any, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    result: Any,
) -> Operation:
    """The operation that has just given `result`; `key` is its function and the specs of its operands."""
    function = key[0]
    sources = {id(tensor.untyped_storage()) for tensor in inputs}
    fresh = [id(tensor.untyped_storage()) not in sources for tensor in outputs]
    view = not any(fresh) and not function._schema.is_mutable
    floats = [tensor.dtype for tensor in (*inputs, *outputs) if tensor.is_floating_point()]
    results = list(result) if isinstance(result, tuple) else [result]
    plain = all(value is None or isinstance(value, Tensor) for value in results)
    fixed = not function._schema.is_mutable and function._overloadpacket is not aten.nonzero
    return Operation(
        *key,
        flops=_flops(function, args, kwargs, result),
        bytes=0 if view else sum(tensor.nbytes for tensor in (*inputs, *outputs)),
        dtype=floats[0] if floats else torch.float32,
        view=view,
        in_place=function._schema.is_mutable and result is args[0],
        outputs=tuple(map(specs, results)) if all(fresh) and plain and fixed else None,
    )


def specs(value: Any) -> Any:
    """An operand, or nested ones, with each tensor as its `TensorSpec`."""
    if isinstance(value, Tensor):
        return TensorSpec(value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(specs(item) for item in value)
    return value


def _flops(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """By torch's own formulas; attention's backward pass is twice its forward, without recomputation."""
    packet = function._overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 2 * sdpa_flop_count(*(tensor.shape for tensor in args[1:4]))
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among nested values."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return list(itertools.chain.from_iterable(tensors_in(value) for value in values))
    return []
