"""Regression on noise-image pairs of the teacher's ODE (DMD, arXiv:2311.18828, section 3.3): generation
and loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from distill.core.conditioning import Conditioning
from distill.core.identity import TEACHER, check_teacher, recorded_teacher, teacher_record
from distill.core.teacher import Teacher
from distill.evaluation.generate import sampling_batches, teacher_sampler
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path, read_json, write_json

FORMAT = "distill-pairs-1"
Features = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class PairOptions:
    """Pairs of captions in turn, by DDIM in `steps` steps at a CFG scale, in files of `shard` pairs."""

    count: int = 5000
    steps: int = 25
    guidance: float = 2.0
    seed: int = 0
    shard: int = 500
    batch: int = 50

    def __post_init__(self) -> None:
        if min(self.count, self.steps, self.shard, self.batch) < 1:
            raise UserError("count, steps, shard and batch of the pairs must be at least 1")


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"pairs_{number:05d}.safetensors"


def make_pairs(teacher: Teacher, captions: Sequence[str], folder: Path | str, options: PairOptions) -> Path:
    """Write the shards that do not exist yet; returns the folder. A pair's noise depends on the seed and its
    position.

    Noise is rounded to fp16 before use, so that what is stored is what was sampled from. Raises `UserError`
    where the folder holds pairs of other options.
    """
    folder = Path(folder)
    facts = {
        "format": FORMAT,
        TEACHER: teacher.name_or_path,
        **teacher_record(teacher.identity),
        "options": vars(options),
        "captions": list(captions),
    }
    if (folder / "pairs.json").is_file() and read_json(folder / "pairs.json") != facts:
        raise UserError(
            f"{folder} holds pairs of another teacher, captions or options: choose another folder"
        )
    write_json(folder / "pairs.json", facts)

    sampler = teacher_sampler(teacher, options.steps, options.guidance)
    for number, start in enumerate(tqdm(range(0, options.count, options.shard), desc="pairs", unit="shard")):
        if shard_path(folder, number).is_file():
            continue
        size = min(options.shard, options.count - start)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + number)
        noise = torch.randn(size, *teacher.latent_shape, generator=generator).half()
        index = torch.arange(start, start + size) % len(captions)
        texts = [captions[i] for i in index]
        with torch.no_grad():
            batches = sampling_batches(teacher, texts, noise, options.batch, generator)
            latents = torch.cat([sampler.sample(batch).cpu() for batch in batches])
        with atomic_path(shard_path(folder, number)) as temporary:
            save_file({"noise": noise, "latents": latents.half(), "caption": index}, temporary)
    return folder


@dataclass(frozen=True)
class Pairs:
    """Noise and latents (N, C, h, w), the conditioning of K captions, and each pair's caption (N,)."""

    noise: Tensor
    latents: Tensor
    conditioning: Conditioning
    caption: Tensor

    def sample(
        self, count: int, generator: torch.Generator, device: torch.device
    ) -> tuple[Tensor, Tensor, Conditioning]:
        """Noise, latents (count, C, h, w) and conditioning of random pairs, on a device."""
        index = torch.randint(len(self.noise), (count,), generator=generator)
        conditioning = self.conditioning.select(self.caption[index])
        return self.noise[index].to(device), self.latents[index].to(device), conditioning.to(device)


def load_pairs(folder: Path | str, teacher: Teacher) -> Pairs:
    """All finished pairs of a folder, their captions through the teacher's `encode_text`.

    Raises `UserError` where there are none, for a damaged shard, and for pairs of another teacher.
    """
    folder = Path(folder)
    facts = read_json(folder / "pairs.json")
    paths = sorted(folder.glob("pairs_*.safetensors"))
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or not paths:
        raise UserError(f"{folder} holds no pairs: make them with scripts/make_pairs.py output={folder}")
    if not isinstance(facts[TEACHER], str):  # a path of a teacher that is not identified
        owner = recorded_teacher(facts, str(folder / "pairs.json"))
        remedy = f"make them (scripts/make_pairs.py output={folder})"
        check_teacher(f"set of pairs {folder}", owner, teacher.identity, remedy)
    try:
        shards = [load_file(path) for path in paths]
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"a shard of {folder} is damaged ({error}): delete it and make the pairs again"
        ) from None
    joined = {name: torch.cat([shard[name] for shard in shards]) for name in ("noise", "latents", "caption")}
    captions = facts["captions"]
    batches = [captions[first : first + 256] for first in range(0, len(captions), 256)]
    conditioning = Conditioning.cat([teacher.encode_text(batch) for batch in batches])
    return Pairs(joined["noise"].float(), joined["latents"].float(), conditioning, joined["caption"])


@dataclass(frozen=True)
class RegressionOptions:
    """The weight on the distance between the student's output for a pair's noise and the pair's latents.

    latents, pixels: half the summed squares. features: of the in-repo judge, as LPIPS (arXiv:1801.03924).
    """

    pairs: str  # a folder of make_pairs.py
    weight: float = 1.0
    distance: Literal["latents", "pixels", "features"] = "latents"
    batch_fraction: float = 1.0  # pairs a step over the batch

    def __post_init__(self) -> None:
        if self.weight <= 0 or not 0 < self.batch_fraction <= 1:
            raise UserError("a regression needs a positive weight and a batch_fraction in (0, 1]")


@final
class Regression:
    """The loss on a random batch of pairs."""

    def __init__(
        self,
        pairs: Pairs,
        options: RegressionOptions,
        decode: Callable[[Tensor], Tensor],
        features: Features | None,
    ) -> None:
        """Raises `UserError` where the distance needs features and there are none."""
        if options.distance == "features" and features is None:
            raise UserError("regression.distance=features needs a judge: give judge=, or distance=latents")
        self.pairs, self.options, self.decode, self.features = pairs, options, decode, features

    def __call__(self, student: Student, batch: int, generator: torch.Generator) -> Tensor:
        """Weight times the mean distance of `batch_fraction * batch` pairs, with gradient."""
        count = max(round(self.options.batch_fraction * batch), 1)
        device = next(student.parameters()).device
        noise, target, conditioning = self.pairs.sample(count, generator, device)
        output = student(noise, conditioning, generator)

        if self.options.distance == "latents":
            return self.options.weight * (output - target).square().sum() / 2 / count
        with torch.no_grad():
            target = self.decode(target)
        images = self.decode(output)
        if self.options.distance == "pixels":
            return self.options.weight * (images - target).square().sum() / 2 / count
        assert self.features is not None
        return self.options.weight * feature_distance(self.features, images, target).mean()


def feature_distance(features: Features, images: Tensor, target: Tensor) -> Tensor:
    """Distances (B,) of images (B, 3, H, W): over layers, mean squared differences of unit channel vectors.

    LPIPS, eq. 1, with all weights 1.
    """
    layers = zip(features(images), features(target), strict=True)
    distances = [(_unit(a) - _unit(b.detach())).square().sum(1).mean((1, 2)) for a, b in layers]
    return torch.stack(distances).sum(0)


def _unit(layer: Tensor) -> Tensor:
    return layer / layer.square().sum(1, keepdim=True).add(1e-10).sqrt()
