"""A latent-diffusion teacher's identity: a digest of its U-Net's weights, whatever path and precision."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor

from distill.core.identity import TeacherIdentity
from distill.runtime.checkpoint import hash_tensors
from distill.runtime.shipped import display_name
from distill.teacher.multi_view import FOLDER, WEIGHTS

VALUES = 1024  # of each tensor, its first: all of Stable Diffusion's would take seconds at every start


def identify(name_or_path: str, folder: Path) -> TeacherIdentity | None:
    """The identity of the teacher in a diffusers folder; None where its network is no single safetensors
    file.

    The digest is of the weights of its U-Net or transformer and of its view conditions: the first `VALUES` of
    each tensor, in the order of their names, rounded to half precision. They are read from the files, as
    weights in memory depend on the precision that they are loaded in (bfloat16 has lost bits that half
    precision keeps); files in float32 and in half precision have the same digest. VAE and text encoder are
    left out: a U-Net fits no others than those that it was trained on.
    """
    network = [folder / name / SAFETENSORS_WEIGHTS_NAME for name in ("unet", "transformer")]
    files = [path for path in (*network, folder / FOLDER / WEIGHTS) if path.is_file()]
    if not any(path in files for path in network):
        return None
    digest = hash_tensors(value for path in files for value in _first_values(path))
    return TeacherIdentity(display_name(name_or_path), digest)


def identify_vae(vae: Any) -> str | None:
    """The digest of a VAE's weights, likewise, in the file that diffusers loaded it from; None without."""
    path = Path(vae.config.get("_name_or_path") or "") / SAFETENSORS_WEIGHTS_NAME
    return hash_tensors(_first_values(path)) if path.is_file() else None


def _first_values(path: Path) -> Iterator[Tensor]:
    """The first values of each tensor of a file, read without the rest, in half precision."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_slice(name)
            rows = math.ceil(VALUES / math.prod(tensor.get_shape()[1:]))
            yield tensor[:rows].flatten()[:VALUES].half()
