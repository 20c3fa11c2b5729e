"""Records what a step computes and stores, from the step itself on torch's meta device.

A meta tensor has a shape and no data: a step of the real trainer with its device set to meta runs at full
size within seconds. Where the step waits for a value of the device, it gets one.
"""

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from distill.planning.meta_functions import IMAGE_KERNELS, MetaFunctions, as_channels_last, is_channels_last
from distill.planning.operations import Operation, Record, operation_of, specs, tensors_in

aten = torch.ops.aten
FORWARD, BACKWARD = "forward", "backward"
OTHER, OPTIMIZER = "rendering, losses", "optimizer"
BLOCK = 512  # bytes that CUDA's allocator rounds up to


class MetaRecorder(TorchDispatchMode):
    """Inside the block, operations on meta tensors are recorded, and the bytes that are alive are counted.

    A value that the host reads from the device is 1 or true, and `nonzero` finds all elements, but for the
    answers that `answering` gives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()
        self.live = self.peak = 0  # bytes
        self._operations: dict[Any, Operation] = {}
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._sizes: list[int] = []
        self._scalar: float | None = None
        self._component = OTHER
        self._starts: list[int] = []  # autograd's sequence numbers at which a component begins, ascending
        self._components: list[str] = []
        self._functions = MetaFunctions()

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

    def attribute(self, modules: Mapping[str, nn.Module]) -> None:
        """Attribute what these modules compute, forward and backward, to their names."""
        for name, module in modules.items():
            module.register_forward_pre_hook(self._caller(name), with_kwargs=True)
            module.register_forward_hook(lambda *_: self._begin(OTHER), always_call=True)

    def _caller(self, name: str) -> Callable[..., None]:
        def call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            self.record.samples[name] += len(tensors_in((*args, *kwargs.values()))[0])
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

    @contextmanager
    def answering(self, sizes: Sequence[int], scalar: float) -> Iterator[None]:
        """Inside the block `nonzero` finds so many elements, in turn; a number that is read is `scalar`."""
        self._sizes, self._scalar = list(sizes), scalar
        try:
            yield
        finally:
            self._sizes, self._scalar = [], None

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((*args, *kwargs.values()))
        on_device = any(tensor.is_meta for tensor in inputs)
        if not on_device:
            result = function(*args, **kwargs)
            if not any(tensor.is_meta for tensor in tensors_in((result,))):
                return result

        key = (function, specs(args), tuple((name, specs(value)) for name, value in kwargs.items()))
        operation = self._operations.get(key)
        if on_device and operation is not None and (operation.in_place or operation.outputs is not None):
            # torch's own kernels for meta take ten times as long
            result = args[0] if operation.in_place else operation.repeat()
        elif on_device:
            result = self._host_value(function, args, kwargs)
            result = function(*args, **kwargs) if result is NotImplemented else result
            if function._overloadpacket in IMAGE_KERNELS and any(map(is_channels_last, inputs)):
                result = as_channels_last(result)

        outputs = [tensor for tensor in tensors_in((result,)) if tensor.is_meta]
        if outputs and operation is None:
            operation = operation_of(key, args, kwargs, inputs, outputs, result)
            self._operations[key] = operation
        if operation is not None:
            self._allocate(outputs)
            component, direction = self._source()
            self.record.operations[component, direction, operation] += 1
        return result

    def _host_value(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the host gets where it reads from the device; NotImplemented where it does not."""
        packet = function._overloadpacket
        if packet is aten.equal:
            return True
        if packet is aten._local_scalar_dense:
            one = torch.ones((), dtype=args[0].dtype).item()
            return one if self._scalar is None or one is True else type(one)(self._scalar)
        if packet is aten.nonzero:
            count = self._sizes.pop(0) if self._sizes else args[0].numel()
            return args[0].new_empty((count, args[0].dim()), dtype=torch.long)
        if packet is aten._to_copy and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if packet is aten.copy_ and args[0].device.type == "cpu":
            return args[0].fill_(1)
        return NotImplemented

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
