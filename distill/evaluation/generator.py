"""How good a generator is: students and their teacher, at any steps and guidance, by the same code on the same captions and noise."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.data.folders import CaptionedImages
from distill.evaluation.features import Extractor
from distill.evaluation.judge import Judge
from distill.evaluation.metrics import frechet_distance, kernel_distance, moments, precision_recall
from distill.evaluation.teacher import graded
from distill.one_step.student import Student
from distill.runtime.checkpoint import fingerprint
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.teacher.clip import caption_features, image_features
from distill.teacher.folder import CLIP, load_clip
from distill.teacher.latent import Teacher


@dataclass(frozen=True)
class Generator:
    """A way to latents: (states (B, L, D), noise (B, C, h, w), generator) to latents; its forward passes a sample; its weights' name."""

    name: str
    sample: Callable[[Tensor, Tensor, torch.Generator], Tensor]
    nfe: int
    weights: str


@dataclass(frozen=True)
class GeneratorEvaluationOptions:
    """`samples` of the test captions in turn; the spread of one caption's samples over `captions` x `each`; k of precision and recall."""

    samples: int = 5000
    captions: int = 100
    each: int = 8
    neighbours: int = 3
    batch: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.samples, self.captions, self.each, self.batch) < 2 or self.neighbours < 1:
            raise UserError("samples, captions, each and batch must be at least 2 and neighbours at least 1")


def student_generator(name: str, student: Student) -> Generator:
    """All of a student's steps."""
    return Generator(
        name,
        lambda states, noise, generator: student(noise, states, generator),
        len(student.times),
        fingerprint(student),
    )


def teacher_generator(teacher: Teacher, steps: int, guidance: float) -> Generator:
    """DDIM with guidance."""
    model = Guided(teacher, teacher.encode_text([""]), guidance)

    def sample(states: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        return sample_ode(model, teacher.scheduler, states, noise, steps)

    name = f"teacher, {steps} steps, guidance {guidance:g}"
    return Generator(name, sample, steps * (1 if guidance == 1 else 2), fingerprint(teacher.unet))


@dataclass(frozen=True)
class TimedSamples:
    """Images (N, 3, H, W) and the seconds that U-Net and decoder took for all of them."""

    images: Tensor
    unet_seconds: float
    decoder_seconds: float


@torch.no_grad()
def draw(
    generator: Generator, teacher: Teacher, captions: Sequence[str], batch: int, seed: int
) -> TimedSamples:
    """An image of each caption, its noise a function of the seed and its place only."""
    source = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(captions), *teacher.latent_shape, generator=source)
    images, spent = [], [0.0, 0.0]
    for part in tqdm(
        torch.arange(len(captions)).split(batch),
        desc=generator.name,
        unit="batch",
        leave=False,
        mininterval=5,
    ):
        states = teacher.encode_text([captions[i] for i in part])
        times = [_now(teacher)]
        latents = generator.sample(states, noise[part].to(teacher.device), source)
        times.append(_now(teacher))
        images.append(teacher.decode(latents).cpu())
        times.append(_now(teacher))
        spent = [spent[0] + times[1] - times[0], spent[1] + times[2] - times[1]]
    return TimedSamples(torch.cat(images), *spent)


def _now(teacher: Teacher) -> float:
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Reference:
    """What generators are compared with: real images' features (N, D), and who tells."""

    data: CaptionedImages
    features: Tensor
    extract: Extractor
    judge: Judge


def kept(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """A row made earlier, where it answers the same question: the same weights, samples and features."""
    row = read_json(path) if path.is_file() else None
    return row if row is not None and row.get("asked") == asked else None


def reference(data: CaptionedImages, extract: Extractor, judge: Judge) -> Reference:
    """A test split with object and colour columns, and its features. Raises `UserError` where those are missing."""
    if not any("object" in row for row in data.rows):
        raise UserError(
            "the test split has no object column: the judge has nothing to compare its answers with"
        )
    return Reference(data, extract(data.composite(slice(None))), extract, judge)


def evaluate(
    generator: Generator, teacher: Teacher, real: Reference, options: GeneratorEvaluationOptions
) -> tuple[dict[str, Any], Tensor]:
    """All figures of a generator, and its first 64 images."""
    rows = [real.data.rows[i % len(real.data)] for i in range(options.samples)]
    captions = [row["text"] for row in rows]
    drawn = draw(generator, teacher, captions, options.batch, options.seed)
    features = real.extract(drawn.images)
    kernel = kernel_distance(real.features, features)
    precision, recall = precision_recall(real.features, features, options.neighbours)
    single = [i for i, row in enumerate(rows) if not row.get("relation")]
    told = graded(real.judge, drawn.images[single], [rows[i] for i in single])
    figures = {
        "generator": generator.name,
        "forwards": generator.nfe,
        "frechet": frechet_distance(moments(features), moments(real.features)),
        "kernel": kernel[0],
        "kernel_sd": kernel[1],
        "precision": precision,
        "recall": recall,
        **{f"judge_{name}": told[name] for name in ("object_and_colour", "view", "held_out_combinations")},
        "diversity": spread(generator, teacher, real, options),
        "unet_seconds": drawn.unet_seconds / options.samples,
        "decoder_seconds": drawn.decoder_seconds / options.samples,
    }
    if (Path(teacher.place) / CLIP).is_dir():
        figures["clip_score"] = clip_score(teacher, drawn.images, captions)
    return figures, drawn.images[:64]


@torch.no_grad()
def clip_score(teacher: Teacher, images: Tensor, captions: Sequence[str]) -> float:
    """Mean cosine of images and their captions under the teacher's own CLIP."""
    clip = load_clip(teacher.place)
    total = 0.0
    for part in torch.arange(len(images)).split(250):
        text = caption_features(clip, teacher.tokenizer, [captions[i] for i in part])
        total += float((image_features(clip, images[part]) * text).sum())
    return total / len(images)


def spread(
    generator: Generator, teacher: Teacher, real: Reference, options: GeneratorEvaluationOptions
) -> float:
    """Root-mean-square deviation of one caption's samples from their mean, in features, over captions spread over the split."""
    chosen = [real.data.rows[i * len(real.data) // options.captions]["text"] for i in range(options.captions)]
    drawn = draw(
        generator,
        teacher,
        [text for text in chosen for _ in range(options.each)],
        options.batch,
        options.seed + 1,
    )
    told = real.extract(drawn.images).reshape(options.captions, options.each, -1)
    return float((told - told.mean(1, keepdim=True)).square().sum(2).mean().sqrt())
