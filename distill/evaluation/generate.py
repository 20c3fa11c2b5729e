"""Captions to images in batches, by a teacher, a student or an adapter: the loop of all evaluation."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from distill.core.conditioning import Conditioning
from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.core.teacher import Teacher
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


def teacher_sampler(teacher: Teacher, steps: int, guidance: float) -> Sampler:
    """DDIM with classifier-free guidance."""
    model = Guided(teacher, teacher.encode_text([""]), guidance)

    def sample(batch: SamplingBatch) -> Tensor:
        return sample_ode(model, teacher.scheduler, batch.conditioning, batch.noise, steps)

    name = f"teacher, {steps} steps, guidance {guidance:g}"
    return Sampler(name, sample, steps * (1 if guidance == 1 else 2), teacher.denoiser.network)


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
def generate(
    teacher: Teacher, captions: Sequence[str], sampler: Sampler, batch: int, seed: int = 0
) -> TimedSamples:
    """One image of each caption. Its initial noise is a function of the seed and its position only."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(captions), *teacher.latent_shape, generator=generator)
    batches = sampling_batches(teacher, captions, noise, batch, generator)
    total = -(-len(captions) // batch)
    images, unet_seconds, decoder_seconds = [], 0.0, 0.0

    for part in tqdm(batches, sampler.name, total, leave=False, unit="batch", mininterval=5):
        started = _now(teacher)
        latents = sampler.sample(part)
        sampled = _now(teacher)
        images.append(teacher.decode(latents).cpu())
        unet_seconds += sampled - started
        decoder_seconds += _now(teacher) - sampled
    return TimedSamples(torch.cat(images), unet_seconds, decoder_seconds)


def _now(teacher: Teacher) -> float:
    """Seconds, once everything queued on the teacher's GPU has finished."""
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
