"""Exponential moving average of a module's parameters."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.runtime.errors import UserError
from distill.runtime.sharding import copy_values, is_sharded


class EMA:
    """Averages w <- d w + (1 - d) p at each update, d = min(decay, (1 + n) / (10 + n)) at the n-th, from 0.

    The ramp of d (as in `diffusers.training_utils.EMAModel`) reduces the weight of the random initialisation.
    Averages are float32 or wider, so that half precision does not round small steps away; buffers are copied,
    not averaged.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        """Raises `UserError` for a decay outside [0, 1]."""
        if not 0.0 <= decay <= 1.0:
            raise UserError(f"the EMA decay is {decay}; expected a number from 0 to 1")
        self.decay = decay
        self.updates = 0
        self._module = module
        self._average = {
            name: value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
            for name, value in module.named_parameters()
        }
        self._copied = {name: value.detach().clone() for name, value in module.named_buffers()}

    @torch.no_grad()
    def update(self) -> None:
        """Average in the module's current parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = list(self._average.values())
        parameters = self._module.parameters()  # read at each update: a parameter may have been replaced
        current = [value.to(average.dtype) for average, value in zip(averages, parameters, strict=True)]
        torch._foreach_lerp_(averages, current, 1.0 - decay)
        _copy(self._copied, dict(self._module.named_buffers()), "buffers")
        self.updates += 1

    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the parameters and buffers of a module of the same structure with the averages."""
        _copy(dict(module.named_parameters()), self._average, "parameters")
        _copy(dict(module.named_buffers()), self._copied, "buffers")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module's parameters are the averages: the two are swapped, not copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._module.named_parameters():
            if is_sharded(parameter):  # of which others hold the storage
                average = self._average[name].clone()
                self._average[name].copy_(parameter.detach())
                parameter.data.copy_(average)
            else:
                self._average[name], parameter.data = parameter.data, self._average[name]

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name and the number of updates."""
        return {"updates": self.updates, "average": dict(self._average), "buffers": dict(self._copied)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state. Raises `UserError` when its names or shapes differ from the module's."""
        _copy(self._average, state["average"], "parameters")
        _copy(self._copied, state["buffers"], "buffers")
        self.updates = int(state["updates"])


@torch.no_grad()
def _copy(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor], kind: str) -> None:
    _check(sorted(targets.keys() ^ sources.keys()), kind, "on one side only")
    misshapen = [name for name, value in targets.items() if value.shape != sources[name].shape]
    _check(misshapen, kind, "of another shape")
    for name, target in targets.items():
        copy_values(target, sources[name])


def _check(names: Iterable[str], kind: str, fault: str) -> None:
    listed = ", ".join(list(names)[:3])
    if listed:
        raise UserError(
            f"the EMA's {kind} do not fit: {listed} {fault}; expected a module of the same structure"
        )
