"""Regression on pairs of noise and what the teacher's ODE makes of it (DMD, arXiv:2311.18828, section 3.3): the maker, the loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path, read_json, write_json
from distill.teacher.latent import Teacher

FORMAT = "distill-pairs-1"
Features = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class PairOptions:
    """`count` pairs of captions in turn, by DDIM in `steps` steps at a guidance scale, in files of `shard` pairs."""

    count: int = 5000
    steps: int = 25
    guidance: float = 3.0
    seed: int = 0
    shard: int = 500
    batch: int = 50

    def __post_init__(self) -> None:
        if min(self.count, self.steps, self.shard, self.batch) < 1:
            raise UserError("count, steps, shard and batch of the pairs must be at least 1")


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"pairs_{number:05d}.safetensors"


def make_pairs(teacher: Teacher, captions: Sequence[str], folder: Path | str, options: PairOptions) -> Path:
    """Write shards that are not there yet; the noise of a pair depends on the seed and its place only. Returns the folder.

    Noise is rounded to fp16 before it is used, so that what is stored is what was sampled from. Raises `UserError` where the
    folder holds pairs of other options.
    """
    folder = Path(folder)
    facts = {"format": FORMAT, "teacher": teacher.place, "options": vars(options), "captions": list(captions)}
    if (folder / "pairs.json").is_file() and read_json(folder / "pairs.json") != facts:
        raise UserError(
            f"{folder} holds pairs of another teacher, captions or options: choose another folder"
        )
    write_json(folder / "pairs.json", facts)
    model = Guided(teacher, teacher.encode_text([""]), options.guidance)
    starts = range(0, options.count, options.shard)
    for number, start in enumerate(tqdm(starts, desc="pairs", unit="shard")):
        path = shard_path(folder, number)
        if not path.is_file():
            size = min(options.shard, options.count - start)
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + number)
            noise = torch.randn(size, *teacher.latent_shape, generator=generator).half()
            index = torch.arange(start, start + size) % len(captions)
            latents = [
                _sampled(model, teacher, captions, index[part], noise[part], options)
                for part in torch.arange(size).split(options.batch)
            ]
            with atomic_path(path) as temporary:
                save_file({"noise": noise, "latents": torch.cat(latents).half(), "caption": index}, temporary)
    return folder


def _sampled(
    model: Guided,
    teacher: Teacher,
    captions: Sequence[str],
    index: Tensor,
    noise: Tensor,
    options: PairOptions,
) -> Tensor:
    states = teacher.encode_text([captions[i] for i in index])
    return sample_ode(model, teacher.scheduler, states, noise.float().to(teacher.device), options.steps).cpu()


@dataclass(frozen=True)
class Pairs:
    """Noise (N, C, h, w), latents alike, and each pair's text states by index: states (K, L, D), caption (N,)."""

    noise: Tensor
    latents: Tensor
    states: Tensor
    caption: Tensor


def load_pairs(folder: Path | str, encode: Callable[[Sequence[str]], Tensor]) -> Pairs:
    """All finished pairs of a folder, captions through a teacher's `encode_text`. Raises `UserError` where there are none."""
    folder = Path(folder)
    facts = read_json(folder / "pairs.json")
    paths = sorted(folder.glob("pairs_*.safetensors"))
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or not paths:
        raise UserError(f"{folder} holds no pairs: make them with scripts/make_pairs.py output={folder}")
    try:
        shards = [load_file(path) for path in paths]
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"a shard of {folder} is damaged ({error}): delete it and make the pairs again"
        ) from None
    joined = {name: torch.cat([shard[name] for shard in shards]) for name in ("noise", "latents", "caption")}
    states = torch.cat([encode(part) for part in _chunks(facts["captions"], 256)])
    return Pairs(joined["noise"].float(), joined["latents"].float(), states, joined["caption"])


def _chunks(values: Sequence[str], size: int) -> list[Sequence[str]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


@dataclass(frozen=True)
class RegressionOptions:
    """`weight` on the distance of what the student makes of a pair's noise: of latents or pixels (half the summed squares), or of features.

    features: of the in-repo judge, in the manner of LPIPS (arXiv:1801.03924).
    """

    pairs: str
    weight: float = 1.0
    distance: Literal["latents", "pixels", "features"] = "latents"
    share: float = 1.0  # pairs a step over the batch

    def __post_init__(self) -> None:
        if self.weight <= 0 or not 0 < self.share <= 1:
            raise UserError("a regression's weight must be positive and its share of the batch within (0, 1]")


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
        self.pairs, self.options, self.decode, self.features = pairs, options, decode, features

    def __call__(self, student: Student, batch: int, generator: torch.Generator) -> Tensor:
        """Weight times the mean distance of `share * batch` pairs, with gradient."""
        count = max(round(self.options.share * batch), 1)
        chosen = torch.randint(len(self.pairs.noise), (count,), generator=generator)
        device = next(student.parameters()).device
        noise, target = self.pairs.noise[chosen].to(device), self.pairs.latents[chosen].to(device)
        made = student(noise, self.pairs.states[self.pairs.caption[chosen]].to(device), generator)
        if self.options.distance == "latents":
            return self.options.weight * (made - target).square().sum() / 2 / count
        with torch.no_grad():
            wanted = self.decode(target)
        if self.options.distance == "pixels":
            return self.options.weight * (self.decode(made) - wanted).square().sum() / 2 / count
        assert self.features is not None
        return self.options.weight * feature_distance(self.features, self.decode(made), wanted).mean()


def feature_distance(features: Features, made: Tensor, wanted: Tensor) -> Tensor:
    """Distances (B,) of images (B, 3, H, W): over layers, mean squared differences of unit channel vectors (LPIPS, eq. 1, w = 1)."""
    both = zip(features(made), features(wanted), strict=True)
    return torch.stack([(_unit(a) - _unit(b.detach())).square().sum(1).mean((1, 2)) for a, b in both]).sum(0)


def _unit(layer: Tensor) -> Tensor:
    return layer / layer.square().sum(1, keepdim=True).add(1e-10).sqrt()
