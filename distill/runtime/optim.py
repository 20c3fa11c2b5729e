"""Learning-rate schedules and the optimisation step, shared by every training loop."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from distill.runtime import processes
from distill.runtime.sharding import is_sharded

MAX_WARMUP = 1000  # steps, of long runs
BUCKET = 2**25  # elements that are averaged in one collective operation


def cosine_decay(step: float, final: float, steps: float = 1.0) -> float:
    """The factor of a learning rate that falls from 1 at step 0 to `final` at `steps` along half a cosine.

    With the default `steps`, `step` is the progress in [0, 1] (Loshchilov & Hutter 2017, arXiv:1608.03983).
    """
    return final + (1 - final) * (1 + math.cos(math.pi * step / steps)) / 2


def cosine_annealing(optimizer: Optimizer, steps: int, final: float) -> CosineAnnealingLR:
    """A scheduler from the optimizer's learning rate to `final` times it over `steps` steps."""
    return CosineAnnealingLR(optimizer, steps, optimizer.param_groups[0]["lr"] * final)


def one_cycle(optimizer: Optimizer, steps: int, warmup: float = 0.3) -> OneCycleLR:
    """A scheduler: up to the optimizer's learning rates over the fraction `warmup` of `steps`, then down.

    From 1/25 of the peak, to 1/250000 of it; Adam's beta1 moves in the opposite direction, from 0.95 to 0.85
    and back (Smith & Topin 2018, arXiv:1708.07120).
    """
    if warmup * steps == 1:  # torch would divide by the warm-up's length, warmup * steps - 1 = 0
        warmup *= 1 - 1e-9
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=warmup)


def warmup_constant_decay(
    optimizer: Optimizer,
    steps: int,
    warmup: float = 0.05,
    decay: float = 0.25,
    law: Literal["linear", "cosine"] = "linear",
) -> LambdaLR:
    """A scheduler: up over the fraction `warmup` of `steps`, constant, down to 0 over the last `decay`.

    The way down is a straight line or half a cosine.

    Up to the last part a run does not depend on its length, so it can be prolonged (arXiv:2405.18392).
    """
    rise, fall = max(min(warmup * steps, MAX_WARMUP), 1), max(decay * steps, 1)

    def factor(step: int) -> float:
        remaining = max(min((steps - step) / fall, 1.0), 0.0)
        down = remaining if law == "linear" else cosine_decay(1 - remaining, 0.0)
        return min((step + 1) / rise, down)

    return LambdaLR(optimizer, factor)


def scale_learning_rates(groups: Iterable[dict[str, Any]], rates: Sequence[float], factor: float) -> None:
    """Set the learning rate of each parameter group to `factor` times its base rate in `rates`."""
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate * factor


def optimizer_step(
    optimizer: Optimizer, loss: Tensor, max_norm: float | None = None, scaler: GradScaler | None = None
) -> None:
    """One update by the gradient of `loss`, as `backward` and `apply_gradients` in turn."""
    accumulated_step(optimizer, [loss], max_norm, scaler)


def accumulated_step(
    optimizer: Optimizer,
    losses: Iterable[Tensor],
    max_norm: float | None = None,
    scaler: GradScaler | None = None,
) -> Tensor:
    """One update by the gradient of the sum of `losses`, each computed after the backward pass of the last.

    Returns the sum.
    """
    optimizer.zero_grad(set_to_none=True)
    values = []
    for loss in losses:
        backward(loss, scaler)
        values.append(loss.detach())
    apply_gradients([optimizer], max_norm, scaler)
    return torch.stack(values).sum()


def backward(loss: Tensor, scaler: GradScaler | None = None) -> None:
    """Add the gradient of `loss`, scaled by the `scaler` of float16 training, to the parameters' own."""
    (loss if scaler is None else scaler.scale(loss)).backward()


def apply_gradients(
    optimizers: Sequence[Optimizer], max_norm: float | None = None, scaler: GradScaler | None = None
) -> None:
    """One update by the parameters' gradients, those of each optimizer clipped to the norm `max_norm`.

    With a `scaler`, gradients that overflowed skip the update and lower the scale. Of several processes the
    gradients are averaged first, so that all clip alike, and all skip an update or none.
    """
    for optimizer in optimizers:
        average_gradients(optimizer)
        if scaler is not None:
            scaler.unscale_(optimizer)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(
                [parameter for group in optimizer.param_groups for parameter in group["params"]], max_norm
            )
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
    if scaler is not None:
        scaler.update()


def average_gradients(optimizer: Optimizer) -> None:
    """Replace the gradients of its parameters by their mean over all processes.

    A parameter that only some processes have a gradient of counts as 0 in the others. Those of sharded
    parameters are means already, and stay as they are.
    """
    if processes.world_size() == 1:
        return
    parameters = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if not is_sharded(parameter)
    ]
    if not parameters:
        return
    given = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    distributed.all_reduce(given, distributed.ReduceOp.MAX)
    gradients = []
    for parameter, needed in zip(parameters, given.tolist(), strict=True):
        if needed and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if needed:
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        distributed.all_reduce(flat)
        means = (flat / processes.world_size()).split([gradient.numel() for gradient in bucket])
        for gradient, mean in zip(bucket, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of together about `BUCKET` elements: their copies take memory of their own."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(value.numel() for value in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
