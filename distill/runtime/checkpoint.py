"""A run's state as one safetensors file: tensors by their path, other values as JSON in its metadata."""

import hashlib
import json
import math
import random
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path

FORMAT = "distill-state-1"


class Stateful(Protocol):
    """Anything a checkpoint can hold: modules, optimizers, schedulers, `EMA`."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state as nested dicts, lists, tensors and numbers."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore such a state."""


class TensorState:
    """Tensors without a module, such as parameters, as one part of a checkpoint; loaded in place."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The tensors in order."""
        return {"tensors": [tensor.detach() for tensor in self._tensors]}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Copy the values of a state of as many tensors of the same shapes."""
        for tensor, value in zip(self._tensors, state["tensors"], strict=True):
            tensor.copy_(value)


@dataclass
class ValueState:
    """Base of dataclasses whose fields (numbers, strings, lists, dicts) are one part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Set the fields. Raises `KeyError` for a state of other fields."""
        if state.keys() != vars(self).keys():
            raise KeyError(f"fields {', '.join(state)}; expected {', '.join(vars(self))}")
        vars(self).update(state)


class Checkpoint(NamedTuple):
    """A readable checkpoint: its path and its state."""

    path: Path
    state: dict[str, Any]


def save_state(path: Path | str, state: Mapping[str, Any]) -> None:
    """Write a nested state atomically.

    Nodes may be mappings with str or int keys, lists, tuples, dense tensors, numeric numpy arrays and
    scalars, int, float, bool, None and str. Mappings come back as plain dicts, tensors on the CPU, all
    dtypes, memory formats (contiguous or channels last) and floats exactly.
    Raises `UserError` for any other type.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "", tensors)
    with atomic_path(path) as temporary:
        save_file(_unshared(tensors), temporary, metadata={"format": FORMAT, "state": json.dumps(tree)})


def load_state(path: Path | str) -> dict[str, Any]:
    """A state written by `save_state`. Raises `UserError` for a missing, damaged or foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # cloned: the tensors of a safetensors file are views of a memory map
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is no readable checkpoint ({error}); expected one that a run saved"
        ) from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is safetensors, but no checkpoint; expected one that a run saved")
    return _decode(json.loads(metadata["state"]), tensors)


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON of a node: lists and scalars as they are, others as {kind: body}; tensors go to `tensors`."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind in (list, tuple):
        items = [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if isinstance(value, Mapping):
        items = [[_key(key, path), _encode(item, f"{path}/{key}", tensors)] for key, item in value.items()]
        return {"dict": items}
    return _encode_array(value, path, tensors)


def _key(key: Any, path: str) -> str | int:
    if type(key) not in (str, int):
        raise UserError(f"state{path} has a key of type {type(key).__name__}; expected str or int keys")
    return key


def _encode_array(value: Any, path: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    try:
        if isinstance(value, Tensor):
            # A fused optimizer pairs moments with parameters by memory order, so the format matters.
            tensor = value.detach()
            kind = "tensor" if tensor.is_contiguous() or not _is_channels_last(tensor) else "channels_last"
        elif isinstance(value, (np.ndarray, np.generic)):
            kind = "array" if isinstance(value, np.ndarray) else "scalar"
            tensor = torch.from_numpy(np.array(value, order="C"))
        else:
            raise TypeError
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.dtype is torch.complex128:
            raise TypeError
    except TypeError:
        raise UserError(
            f"state{path} is {_described(value)}, which a checkpoint cannot hold; expected dense tensors,"
            " numeric numpy values, dicts, lists, tuples, numbers, strings or None"
        ) from None
    name = path.lstrip("/")
    while name in tensors or name in ("", "__metadata__"):  # keys with slashes, or 1 beside "1", collide
        name += "_"
    tensors[name] = tensor
    return {kind: name}


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.layout} {value.dtype} tensor"
    return f"a numpy array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in one storage (which safetensors refuses)."""
    storages: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous().resolve_conj().resolve_neg()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return result


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, body),) = node.items()
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in body}
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in body)
    if kind == "float":
        return float(body)
    if kind == "tensor":
        return tensors[body]
    if kind == "channels_last":
        return tensors[body].contiguous(memory_format=torch.channels_last)
    array = tensors[body].numpy()
    return array if kind == "array" else array[()]


def checkpoint_path(folder: Path, step: int) -> Path:
    """The path of the checkpoint after `step` finished steps."""
    return folder / f"step_{step:08d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    paths = folder.glob("step_*.safetensors")
    return sorted(path for path in paths if re.fullmatch(r"step_\d{8}", path.stem))


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest readable checkpoint; None where there is no checkpoint.

    Damaged newer ones are reported on stderr and removed: `prune` would count them among the newest.
    Raises `UserError` when there are checkpoints but none can be read.
    """
    damaged: list[Path] = []
    for path in reversed(checkpoints(folder)):
        try:
            newest = Checkpoint(path, load_state(path))
        except UserError as error:
            print(f"warning: {error}; trying the previous checkpoint", file=sys.stderr)
            damaged.append(path)
            continue
        for damaged_path in damaged:
            damaged_path.unlink()
        return newest
    if damaged:
        raise UserError(f"none of the checkpoints in {folder} can be read; start over with overwrite=true")
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints, and the temporary files of killed saves."""
    for path in [*checkpoints(folder)[:-keep], *folder.glob(".step_*.safetensors")]:
        path.unlink(missing_ok=True)


def seed_everything(seed: int) -> None:
    """Seed the global generators of python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The states of the global generators of python, numpy (legacy) and torch, with CUDA's where in use."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore a state of `random_state`; CUDA's only on a machine with as many devices."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def fingerprint(*modules: nn.Module) -> str:
    """A hash of the modules' weights: the key of caches that depend on them."""
    return hash_tensors(value for module in modules for value in module.state_dict().values())


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """A hash of the values of tensors, as float32, in their order: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for value in tensors:
        digest.update(value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
