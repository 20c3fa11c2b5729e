"""What every training must fulfil in every precision, for the tests of several rooms."""

from pathlib import Path

import torch

from distill.runtime.checkpoint import checkpoints, load_state

HALF = (torch.bfloat16, torch.float16)


def tensors_of(node: object, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state by their path."""
    if isinstance(node, torch.Tensor):
        return {path: node}
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return {name: value for key, child in items for name, value in tensors_of(child, f"{path}/{key}").items()}


def assert_float32_checkpoints(directory: Path) -> None:
    """No weight and no moment in a run's checkpoints is in half precision, and all are finite."""
    paths = checkpoints(directory / "checkpoints")
    assert paths
    for path in paths:
        tensors = tensors_of(load_state(path)["parts"])
        assert tensors and [name for name, value in tensors.items() if value.dtype in HALF] == []
        assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
