"""One update of several optimizers after a backward pass that they have in common."""

from collections.abc import Sequence

from torch.amp import GradScaler
from torch.optim import Optimizer

from distill.runtime.optim import apply_gradients


def update_weights(
    optimizers: Sequence[Optimizer], max_norm: float | None = None, scaler: GradScaler | None = None
) -> None:
    """Update by the gradients' mean over all processes, each optimizer's clipped to `max_norm`; free them."""
    apply_gradients(optimizers, max_norm, scaler)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
