"""A loss of fixed shapes whose forward and backward passes are replayed as one CUDA graph.

A small network is bound by the host, which launches thousands of kernels a step; a replay is one launch
(https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture).
"""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

WARMUP = 3  # eager passes before the capture, in which libraries choose algorithms and allocate workspaces


@final
class GraphedLoss:
    """`loss(inputs)` and its gradients, captured at the first call and replayed at every one.

    Replays read the memory of the first inputs, into which later ones are copied, and overwrite the same
    gradients: between calls an optimizer must not set them to None. The loss must neither wait for the
    device nor draw random numbers.
    """

    def __init__(
        self, loss: Callable[[Sequence[Tensor]], Tensor], parameters: Sequence[nn.Parameter]
    ) -> None:
        self._loss, self._parameters = loss, parameters
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._value = torch.empty(())

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """The detached loss; afterwards the parameters' `grad` are its gradients, alone.

        Raises `ValueError` where the inputs differ in shape or dtype from those of the first call.
        """
        if self._graph is None:
            self._graph = self._capture(inputs)
        shapes = [(value.shape, value.dtype) for value in inputs]
        if shapes != [(value.shape, value.dtype) for value in self._inputs]:
            raise ValueError(f"inputs {shapes} differ from those of the captured graph")
        torch._foreach_copy_(self._inputs, list(inputs))
        self._graph.replay()
        return self._value.clone()

    def _capture(self, inputs: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        self._inputs = [value.clone() for value in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self._backward()
        torch.cuda.current_stream().wait_stream(stream)
        for parameter in self._parameters:
            parameter.grad = None  # allocated in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._value = self._backward()
        return graph

    def _backward(self) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        loss = self._loss(self._inputs)
        loss.backward()
        return loss.detach()
