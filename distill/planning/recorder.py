"""Records what a step computes and stores, from the step itself on torch's meta device.

A meta tensor has a shape and no data: a step of the real trainer with its device set to meta runs at full
size within seconds. Where the step waits for a value of the device, it gets one.
"""

import itertools
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten
FORWARD, BACKWARD = "forward", "backward"
OTHER, OPTIMIZER = "rendering, losses", "optimizer"
BLOCK = 512  # bytes that CUDA's allocator rounds up to
# As CUDA's autocast: these compute in the low precision, those in float32.
LOW = {F.linear, F.conv1d, F.conv2d, torch.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__}
LOW |= {torch.bmm, torch.baddbmm, torch.addmm, F.scaled_dot_product_attention}
FULL = {F.group_norm, F.layer_norm, torch.group_norm, torch.layer_norm, F.softmax, torch.softmax, F.mse_loss}


@dataclass(frozen=True)
class TensorSpec:
    """Shape, strides and dtype of an operand."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
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
        return Record(operations, samples)  # type: ignore[arg-type]

    def __add__(self, other: "Record") -> "Record":
        return Record(self.operations + other.operations, self.samples + other.samples)


class MetaRecorder(TorchDispatchMode):
    """Inside the block, operations on meta tensors are recorded, and the bytes that are alive are counted.

    A value that the host reads from the device is 1 or true; `nonzero` finds all elements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()
        self.live = self.peak = 0  # bytes
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._component = OTHER
        self._starts: list[int] = []  # autograd's sequence numbers at which a component begins, ascending
        self._components: list[str] = []
        self._functions = _MetaFunctions()

    def __enter__(self) -> "MetaRecorder":
        self._hooks = [
            register_optimizer_step_pre_hook(lambda *_: self._begin(OPTIMIZER)),
            register_optimizer_step_post_hook(lambda *_: self._begin(OTHER)),
        ]
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._functions.__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def watch(self, modules: Mapping[str, nn.Module]) -> None:
        """Attribute what these modules compute, forward and backward, to their names."""
        for name, module in modules.items():
            module.register_forward_pre_hook(self._caller(name), with_kwargs=True)
            module.register_forward_hook(lambda *_: self._begin(OTHER), always_call=True)

    def _caller(self, name: str) -> Callable[..., None]:
        def call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            self.record.samples[name] += len(_tensors((*args, *kwargs.values()))[0])
            self._begin(name)

        return call

    def _begin(self, component: str) -> None:
        self._component = component
        self._starts.append(torch.autograd._get_sequence_nr())
        self._components.append(component)

    def _source(self) -> tuple[str, str]:
        """The component of an operation, and its direction: backward of what ran forward then."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._component, FORWARD
        position = bisect_right(self._starts, node._sequence_nr()) - 1
        last = node._sequence_nr() >= 2**63  # gradients' accumulation has no place in the order
        return (OTHER if last or position < 0 else self._components[position]), BACKWARD

    @contextmanager
    def measured(self) -> Iterator[Record]:
        """What the block records; the peak starts anew."""
        before, self.record = self.record, Record()
        self.peak = self.live
        try:
            yield self.record
        finally:
            self.record = before

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((*args, *kwargs.values()))
        if not any(tensor.is_meta for tensor in inputs):
            result = function(*args, **kwargs)
        else:
            result = _host_value(function, args, kwargs)
            result = function(*args, **kwargs) if result is NotImplemented else result
        outputs = [tensor for tensor in _tensors((result,)) if tensor.is_meta]
        self._allocate(outputs)
        if outputs:
            operation = _operation(function, args, kwargs, inputs, outputs, result)
            self.record.operations[(*self._source(), operation)] += 1
        return result

    def _allocate(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = id(storage)
            if key in self._storages:
                continue
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self._storages[key] = weakref.ref(storage, self._release(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int) -> Callable[[Any], None]:
        def release(_: Any) -> None:
            del self._storages[key]
            self.live -= size

        return release


class _MetaFunctions(TorchFunctionMode):
    """Attention without its matrix, and autocast, neither of which the meta device has."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function not in LOW and function not in FULL:
            return function(*args, **kwargs)
        if any(tensor.is_meta for tensor in _tensors(args)):
            if torch.is_autocast_enabled("cpu"):
                dtype = torch.get_autocast_dtype("cpu") if function in LOW else torch.float32
                args = [_cast(value, dtype) for value in args]
                kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
            if function is F.scaled_dot_product_attention:
                return _attention(*args, **kwargs)
        return function(*args, **kwargs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **kwargs: Any
) -> Tensor:
    mask = None if attn_mask is None else attn_mask.to(query.dtype)
    options = {"attn_mask": mask, "scale": kwargs.get("scale")}
    causal = bool(kwargs.get("is_causal", False))
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, **options)[0]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    low = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if low else value


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return list(itertools.chain.from_iterable(_tensors(value) for value in values))
    return []


def _host_value(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the host gets where it reads from the device; NotImplemented where it does not."""
    packet = function._overloadpacket
    if packet in (aten._local_scalar_dense, aten.equal):
        dtype = args[0].dtype
        return True if packet is aten.equal else torch.ones((), dtype=dtype).item()
    if packet is aten.nonzero:
        return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
    if packet is aten._to_copy and torch.device(kwargs.get("device") or "meta").type == "cpu":
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    if packet is aten.copy_ and args[0].device.type == "cpu":
        return args[0].fill_(1)
    return NotImplemented


def _operation(
    function: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    result: Any,
) -> Operation:
    sources = {id(tensor.untyped_storage()) for tensor in inputs}
    shared = all(id(tensor.untyped_storage()) in sources for tensor in outputs)
    view = shared and not function._schema.is_mutable
    floats = [tensor.dtype for tensor in (*inputs, *outputs) if tensor.is_floating_point()]
    return Operation(
        function=function,
        args=_specs(tuple(args)),
        kwargs=tuple((name, _specs(value)) for name, value in kwargs.items()),
        flops=_flops(function, args, kwargs, result),
        bytes=0 if view else sum(tensor.nbytes for tensor in (*inputs, *outputs)),
        dtype=floats[0] if floats else torch.float32,
        view=view,
    )


def _specs(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorSpec(tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(_specs(item) for item in value)
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
