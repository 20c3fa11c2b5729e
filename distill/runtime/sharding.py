"""Networks whose weights, gradients and optimizer states are split among the processes (FSDP2).

Zhao et al. 2023, arXiv:2304.11277, in torch's second version. A checkpoint holds whole tensors, so that any
number of processes resumes it, sharded or not.
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.runtime import processes


def shard(
    network: nn.Module, optimizers: Sequence[Optimizer] = (), whole: Collection[nn.Parameter] = ()
) -> None:
    """Shard the weights of a network of diffusers in place, but those that stay `whole`.

    The optimizers, which have not made a step, then hold the sharded parameters; both load whole states. No
    effect in a single process.
    """
    if processes.world_size() == 1:
        return
    from torch.distributed.fsdp import fully_shard  # importing it takes as long as half of torch

    _as_contiguous(network)
    parameters = list(network.named_parameters())
    for module in _units(network):
        fully_shard(module, reshard_after_forward=True, ignored_params=set(whole))
    current = dict(network.named_parameters())
    replaced = {value: current[name] for name, value in parameters}
    for module in network.modules():
        module.register_load_state_dict_pre_hook(_distribute_weights)
    for optimizer in optimizers:
        groups = optimizer.param_groups
        if not any(parameter in replaced for group in groups for parameter in group["params"]):
            continue  # it updates other networks
        for group in groups:
            group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
        optimizer.register_load_state_dict_post_hook(_distribute_state)


@torch.no_grad()
def _as_contiguous(network: nn.Module) -> None:
    """Weights in channels last cannot be split."""
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()


def _units(network: nn.Module) -> list[nn.Module]:
    """The modules whose weights are gathered together, inner ones first, and the network itself.

    Blocks by the names that diffusers gives, and all others that hold weights one by one: those of the
    network itself would not be gathered in the backward pass of a part of it, as a discriminator's.
    """
    names = set(getattr(network, "_no_split_modules", None) or ())
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    inner = {module for block in blocks for module in block.modules() if module is not block}
    single = [
        module
        for module in network.modules()
        if module not in inner and next(module.parameters(recurse=False), None) is not None
    ]
    units = {*blocks, *single, network}
    return [module for module in reversed(list(network.modules())) if module in units]


def is_sharded(value: object) -> bool:
    """Whether `shard` has split a tensor, or the weights of a network."""
    if isinstance(value, nn.Module):
        return any(is_sharded(parameter) for parameter in value.parameters())
    module = sys.modules.get("torch.distributed.tensor")  # nothing is sharded before its first import
    return module is not None and isinstance(value, module.DTensor)


def local_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor: all of it, where it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def distributed_as(value: Tensor, target: Any) -> Tensor:
    """A whole value, sharded as the tensor `target` is."""
    if not is_sharded(target) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def gathered(state: Any, keep: bool = True) -> Any:
    """A nested state with whole tensors, on the CPU where they were sharded.

    All processes must call it; those that do not `keep` them get None in place of these tensors.
    """
    if is_sharded(state):
        whole = state.detach().full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, Mapping):
        return {name: gathered(value, keep) for name, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(gathered(value, keep) for value in state)
    return state


def _distribute_weights(module: nn.Module, state: dict[str, Any], prefix: str, *args: object) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if prefix + name in state:
            state[prefix + name] = distributed_as(state[prefix + name], parameter)


def _distribute_state(optimizer: Optimizer) -> None:
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = distributed_as(value, parameter)


@torch.no_grad()
def copy_values(target: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor, which may be sharded."""
    target.copy_(distributed_as(value, target))
