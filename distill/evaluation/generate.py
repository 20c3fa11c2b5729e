"""Captions to images in batches, by a teacher, a student or an adapter: the loop of all evaluation."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from distill.core.conditioning import Conditioning
from distill.core.samplers import SamplerName, sample_by_name
from distill.core.score import Guided, guidance_nfe
from distill.core.teacher import Teacher
from distill.core.views import POSE
from distill.one_step.student import Student


@dataclass(frozen=True)
class SamplingBatch:
    """One batch of samples.

    indices: (B,) positions among the captions; conditioning: B rows; noise: (B, C, h, w), standard normal;
    generator: where a sampler draws further noise from.
    """

    indices: Tensor
    conditioning: Conditioning
    noise: Tensor
    generator: torch.Generator


@dataclass(frozen=True)
class Sampler:
    """A map from a batch to clean latents (B, C, h, w), its NFE (guidance counts twice) and its network."""

    name: str
    sample: Callable[[SamplingBatch], Tensor]
    nfe: int
    network: Any  # an nn.Module; diffusers' classes are untyped


def teacher_sampler(
    teacher: Teacher, steps: int, guidance: float, poses: Tensor | None = None, sampler: SamplerName = "ddim"
) -> Sampler:
    """A sampler with classifier-free guidance, conditioned on the poses (N, 5) of the N captions if given."""
    model = Guided(teacher, teacher.encode_text([""]), guidance)

    def sample(batch: SamplingBatch) -> Tensor:
        conditioning = batch.conditioning
        if poses is not None:
            conditioning = conditioning.with_extras(**{POSE: poses[batch.indices].to(batch.noise)})
        return sample_by_name(
            sampler, model, teacher.scheduler, conditioning, batch.noise, steps, batch.generator
        )

    further = ["camera"] * (poses is not None) + [sampler] * (sampler != "ddim")
    name = ", ".join(["teacher", f"{steps} steps", f"guidance {guidance:g}", *further])
    return Sampler(name, sample, steps * guidance_nfe(guidance), teacher.denoiser.network)


def student_sampler(name: str, student: Student) -> Sampler:
    """All steps of a student."""

    def sample(batch: SamplingBatch) -> Tensor:
        return student(batch.noise, batch.conditioning, batch.generator)

    return Sampler(name, sample, len(student.timesteps), student)


@dataclass(frozen=True)
class TimedSamples:
    """Images (N, 3, H, W) on the CPU and the seconds that U-Net and decoder took for all of them."""

    images: Tensor
    unet_seconds: float
    decoder_seconds: float


def sampling_batches(
    teacher: Teacher, captions: Sequence[str], noise: Tensor, batch: int, generator: torch.Generator
) -> Iterator[SamplingBatch]:
    """Captions and their noise (N, C, h, w) in batches on the teacher's device."""
    for indices in torch.arange(len(captions)).split(batch):
        conditioning = teacher.encode_text([captions[i] for i in indices])
        yield SamplingBatch(indices, conditioning, noise[indices].float().to(teacher.device), generator)


@torch.no_grad()
def generate_batches(
    teacher: Teacher, captions: Sequence[str], sampler: Sampler, batch: int, seed: int = 0
) -> Iterator[TimedSamples]:
    """One image of each caption, batch by batch, in order, with a progress bar.

    The initial noise of an image is a function of the seed and its position only.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(captions), *teacher.latent_shape, generator=generator)
    batches = sampling_batches(teacher, captions, noise, batch, generator)
    total = -(-len(captions) // batch)
    for part in tqdm(batches, sampler.name, total, leave=False, unit="batch", mininterval=5):
        started = _now(teacher)
        latents = sampler.sample(part)
        sampled = _now(teacher)
        images = teacher.decode(latents).cpu()
        yield TimedSamples(images, sampled - started, _now(teacher) - sampled)


def generate(
    teacher: Teacher, captions: Sequence[str], sampler: Sampler, batch: int, seed: int = 0
) -> TimedSamples:
    """All images of `generate_batches` at once."""
    parts = list(generate_batches(teacher, captions, sampler, batch, seed))
    return TimedSamples(
        torch.cat([part.images for part in parts]),
        sum(part.unet_seconds for part in parts),
        sum(part.decoder_seconds for part in parts),
    )


def _now(teacher: Teacher) -> float:
    """Seconds, once everything queued on the teacher's GPU has finished."""
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
