"""Checkpoints: exact round trips, clear errors, fallback from damaged files."""

import math
import random
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distill.runtime.checkpoint import (
    TensorState,
    ValueState,
    checkpoint_path,
    checkpoints,
    load_newest,
    load_state,
    prune,
    random_state,
    save_state,
    seed_everything,
    set_random_state,
)
from distill.runtime.errors import UserError


def same(a: Any, b: Any) -> bool:
    """Equality of type, structure, dtype and every bit."""
    if isinstance(a, torch.Tensor):
        return type(b) is torch.Tensor and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (np.ndarray, np.generic)):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bool(np.all(a == b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


NESTED: dict[str, Any] = {
    "ints": {0: "zero", 1: {"1": torch.arange(3)}, -5: None},
    "same/name": torch.zeros(2),
    "same": {"name": torch.ones(2), 1: torch.ones(1), "1": torch.zeros(1)},
    "__metadata__": torch.ones(1),
    "tuple": (1, (2.5, "three"), [True, None, ()]),
    "floats": [0.1, 1e-300, math.inf, -math.inf, math.nan, -0.0, 1.0],
    "big": 2**77,
    "dtypes": [torch.ones(2, dtype=t) for t in (torch.bfloat16, torch.float16, torch.float64, torch.int64)],
    "bool": torch.tensor(True),
    "empty": [torch.zeros(0, 3), {}, [], ""],
    "transposed": torch.arange(6).reshape(2, 3).T,
    "numpy": [np.arange(4, dtype=np.uint32), np.array(3), np.arange(4).reshape(2, 2)[:, ::-1]],
    "numpy scalars": [np.float32(0.1), np.float64(0.1), np.bool_(True)],
}


def test_nested_state_round_trips(tmp_path: Path) -> None:
    save_state(tmp_path / "s.safetensors", NESTED)
    assert same(NESTED, load_state(tmp_path / "s.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_shared_storage_and_mappings(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    save_state(tmp_path / "s.safetensors", OrderedDict(a=base, b=base, c=base[2:], d=nn.Parameter(base[:2])))
    loaded = load_state(tmp_path / "s.safetensors")
    assert same(loaded, {"a": base, "b": base, "c": base[2:], "d": base[:2]})
    loaded["a"].zero_()
    assert torch.equal(loaded["b"], base)


def test_optimizer_and_scheduler_round_trip(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    save_state(tmp_path / "s.safetensors", state)
    loaded = load_state(tmp_path / "s.safetensors")
    assert same(state, loaded)
    assert set(loaded["optimizer"]["state"]) == {0, 1}
    assert isinstance(loaded["optimizer"]["param_groups"][0]["betas"], tuple)


COMPLEX, SPARSE = torch.ones(2, dtype=torch.complex128), torch.eye(2).to_sparse()


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, np.array(["a"]), COMPLEX, SPARSE, b"x"])
def test_unsupported_values_are_errors_with_their_path(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UserError, match=r"state/a/0 is a .* cannot hold"):
        save_state(tmp_path / "s.safetensors", {"a": [value]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", [True, 1.5, ("a",), None])
def test_unsupported_keys_are_errors(tmp_path: Path, key: Any) -> None:
    with pytest.raises(UserError, match="expected str or int keys"):
        save_state(tmp_path / "s.safetensors", {key: 1})


def test_foreign_and_missing_files_are_errors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("foreign", "text", "missing"):
        with pytest.raises(UserError, match=f"{name}.safetensors is"):
            load_state(tmp_path / f"{name}.safetensors")


def fill(folder: Path, *steps: int) -> None:
    for step in steps:
        save_state(checkpoint_path(folder, step), {"step": step, "weights": torch.full((100,), step)})


def test_truncated_newest_checkpoints_fall_back_to_an_older_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, 1, 2, 3)
    for step, size in ((2, 200), (3, 900)):
        path = checkpoint_path(tmp_path, step)
        path.write_bytes(path.read_bytes()[:-size])
    newest = load_newest(tmp_path)
    assert newest and newest.state["step"] == 1 and newest.path == checkpoint_path(tmp_path, 1)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and "step_00000003" in warnings[0] and "step_00000002" in warnings[1]
    fill(tmp_path, 4)
    prune(tmp_path, 2)
    assert checkpoints(tmp_path) == [checkpoint_path(tmp_path, step) for step in (1, 4)]


def test_folders_without_a_readable_checkpoint(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "absent") is None
    checkpoint_path(tmp_path, 1).write_bytes(b"")
    with pytest.raises(UserError, match="none of the checkpoints"):
        load_newest(tmp_path)
    assert checkpoint_path(tmp_path, 1).exists()


def test_prune_keeps_the_newest_and_foreign_files(tmp_path: Path) -> None:
    fill(tmp_path, 5, 100, 20)
    for name in ("step_last.safetensors", ".step_00000007.99.safetensors", "other.safetensors"):
        (tmp_path / name).write_text("x")
    prune(tmp_path, 1)
    remaining = sorted(path.name for path in tmp_path.iterdir())
    assert remaining == ["other.safetensors", "step_00000100.safetensors", "step_last.safetensors"]


def test_random_state_round_trips_through_a_file(tmp_path: Path) -> None:
    def draw() -> list[float]:
        values = [random.random(), random.gauss(0, 1), torch.randn(3).sum().item()]
        return [*values, np.random.randn(), np.random.rand()]

    seed_everything(3)
    np.random.randn()  # numpy caches a second Gaussian, which is part of its state
    random.gauss(0, 1)
    save_state(tmp_path / "s.safetensors", random_state())
    expected = draw()
    assert draw() != expected
    set_random_state(load_state(tmp_path / "s.safetensors"))
    assert draw() == expected
    seed_everything(-1)


def test_loose_tensors_are_loaded_in_place() -> None:
    parameter, target = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    TensorState(target).load_state_dict(TensorState(parameter).state_dict())
    assert torch.equal(target, parameter)
    assert target.requires_grad and target.is_leaf


def test_value_state_restores_its_fields_and_refuses_others() -> None:
    @dataclass
    class Counts(ValueState):
        updates: int
        best: dict[str, float]

    saved, restored = Counts(3, {"fid": 1.5}), Counts(0, {})
    state = saved.state_dict()
    saved.best["fid"] = 0.0  # a state is a copy
    restored.load_state_dict(state)
    assert restored == Counts(3, {"fid": 1.5})
    with pytest.raises(KeyError, match="expected updates, best"):
        restored.load_state_dict({"updates": 1})


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_of_channels_last_weights_resumes_bit_for_bit(tmp_path: Path, fused: bool) -> None:
    """Fused AdamW reads moments in memory order: contiguous ones would belong to other weights."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(8, 4, 3, 3, generator=generator) for _ in range(4)]

    def train(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: slice) -> None:
        for gradient in gradients[steps]:
            weight.grad = gradient.to(memory_format=torch.channels_last)
            optimizer.step()

    weight = torch.nn.Parameter(torch.ones(8, 4, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    train(weight, optimizer, slice(0, 2))
    save_state(tmp_path / "state.safetensors", {"weight": weight, "optimizer": optimizer.state_dict()})
    train(weight, optimizer, slice(2, 4))

    state = load_state(tmp_path / "state.safetensors")
    resumed = torch.nn.Parameter(torch.ones(8, 4, 3, 3).to(memory_format=torch.channels_last))
    resumed.data.copy_(state["weight"])
    optimizer = torch.optim.AdamW([resumed], fused=fused)
    optimizer.load_state_dict(state["optimizer"])
    train(resumed, optimizer, slice(2, 4))
    assert resumed.equal(weight)
