"""Derivatives of a network along the teacher's ODE: Jacobian-vector products through diffusers' modules."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def value_and_derivative(
    module: nn.Module,
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    directions: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """A function of a module's, at inputs, and its derivative where they move along directions.

    In the precision of the weights: autocast casts weights and not the inputs that carry a derivative.
    """
    # Fused attention has no forward-mode derivative.
    full = torch.autocast(inputs[0].device.type, enabled=False)
    with full, sdpa_kernel(SDPBackend.MATH), _contiguous_norms(module):
        value, derivative = torch.func.jvp(function, inputs, directions)[:2]
    return value, derivative


@contextmanager
def _contiguous_norms(module: nn.Module) -> Iterator[None]:
    """Inside the block group norms copy their inputs: torch's derivative fails for channels in last place."""

    def copy(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(value.clone(memory_format=torch.contiguous_format) for value in inputs)

    norms = [layer for layer in module.modules() if isinstance(layer, nn.GroupNorm)]
    handles = [norm.register_forward_pre_hook(copy) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
