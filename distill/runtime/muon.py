"""Muon: momentum whose matrices are orthogonalised, with Adam for what is no matrix."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration: steep at 0, in [0.7, 1.2] after five
ITERATIONS = 5
RMS = 0.2  # of an update's elements at learning rate 1, near that of AdamW (arXiv:2502.16982, section 2.2)
SMALLEST_SIDE = 16  # of a matrix; narrower ones are left to Adam, as biases are


class Muon(Optimizer):
    """The optimiser of Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), for convolutions too.

    A weight of two or more dimensions is a matrix of its first dimension by all others. Its update is the
    orthogonal matrix nearest to Nesterov momentum, scaled to the root mean square `RMS`, so that one learning
    rate and weight decay serve both kinds (Liu et al. 2025, arXiv:2502.16982, equation 4). Other parameters
    are updated by AdamW. torch.optim.Muon takes neither convolutions nor biases.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        given = list(parameters)
        matrices = [weight for weight in given if is_matrix(weight)]
        others = [weight for weight in given if not is_matrix(weight)]
        groups = [{"params": matrices, "matrices": True}, {"params": others, "matrices": False}]
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__([group for group in groups if group["params"]], defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update by the parameters' gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights: list[Tensor] = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            if group["matrices"]:
                self._update_matrices(weights, group)
            else:
                self._update_others(weights, group)
        return loss

    def _update_matrices(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        gradients = _gradients(weights)
        momenta = self._moments(weights, "momentum")
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight, direction in zip(weights, directions, strict=True):
            matrix = direction.flatten(1)
            by_shape[matrix.shape[0], matrix.shape[1]].append((weight, matrix))
        for shape, same in by_shape.items():  # of one shape at a time: few large products
            updates = orthogonalize(torch.stack([matrix for _, matrix in same]))
            scale = RMS * max(shape) ** 0.5  # an orthogonal matrix has the root mean square 1 / sqrt(max)
            changed = [weight for weight, _ in same]
            steps = [update.view_as(weight) for weight, update in zip(changed, updates, strict=True)]
            torch._foreach_add_(changed, steps, alpha=-group["lr"] * scale)

    def _update_others(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        gradients = _gradients(weights)
        counts = []
        for weight in weights:
            state = self.state[weight]
            state["step"] = state.get("step", torch.zeros(())) + 1
            counts.append(state["step"].item())
        means, squares = (self._moments(weights, name) for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - second)
        deviations = torch._foreach_div(squares, [1 - second**count for count in counts])
        torch._foreach_sqrt_(deviations)
        torch._foreach_add_(deviations, group["eps"])
        rates = [-group["lr"] / (1 - first**count) for count in counts]
        torch._foreach_addcdiv_(weights, means, deviations, rates)

    def _moments(self, weights: list[Tensor], name: str) -> list[Tensor]:
        """The state of a name of each weight, zeros at first."""
        for weight in weights:
            if name not in self.state[weight]:
                self.state[weight][name] = torch.zeros_like(weight)
        return [self.state[weight][name] for weight in weights]


def _gradients(weights: list[Tensor]) -> list[Tensor]:
    return [weight.grad for weight in weights if weight.grad is not None]


def is_matrix(weight: Tensor) -> bool:
    """Whether a parameter is updated as a matrix: of two dimensions or more, neither side of it narrow."""
    return weight.ndim >= 2 and min(weight.shape[0], weight[0].numel()) >= SMALLEST_SIDE


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices (N, rows, columns) with their singular values moved to about 1, between 0.7 and 1.2.

    By the Newton-Schulz iteration X <- (a + b G + c G^2) X with G = X X^T. The factors commute with G, so
    they are multiplied on the smaller side alone, which is cheaper for wide matrices. Singular values under
    a thousandth of a matrix's norm may remain smaller.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = wide @ wide.mT
    identity = torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype)
    product = identity.expand_as(gram)
    for iteration in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * identity
        product = factor @ product
        if iteration < ITERATIONS - 1:
            gram = factor @ factor @ gram
    return (product @ wide).mT if tall else product @ wide
