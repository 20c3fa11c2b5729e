"""Fixtures of several tests: a closed-form score model and a tiny untrained teacher."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may reach for the network

from collections.abc import Callable
from pathlib import Path
from typing import final

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule
from distill.core.score import Prediction, ScoreModel
from distill.teacher.clip import ClipOptions, build_clip
from distill.teacher.folder import TeacherParts, save_teacher
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion
from distill.teacher.unet import UnetOptions, build_unet, make_scheduler
from distill.teacher.vae import VaeOptions, build_vae
from distill.teacher.view_training import ViewTrainingOptions
from distill.teacher.vocabulary import build_tokenizer
from sds3d.text_to_3d.prompts import VIEWS, view_prompt
from sds3d.world.shapes import COLOURS, OBJECTS, RELATIONS
from sds3d.world.world import PHRASES, VIEW_PHRASES


@final
class GaussianScore(ScoreModel):
    """Exact predictions for x0 ~ N(m, s^2) in each element; the mean m is the embedding (B, 1, 1).

    `queries` records the embeddings of every call.
    """

    def __init__(self, std: float, schedule: NoiseSchedule) -> None:
        self.std, self.schedule = std, schedule
        self.queries: list[Tensor] = []

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """eps = sigma (x_t - alpha m) / (alpha^2 s^2 + sigma^2)."""
        self.queries.append(conditioning.embedding)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        eps = sigma * (x_t - alpha * conditioning.embedding[..., None]) / (alpha**2 * self.std**2 + sigma**2)
        return Prediction.from_output(eps, x_t, t, self.schedule, "epsilon")


@pytest.fixture(scope="session")
def schedule() -> NoiseSchedule:
    """Stable Diffusion's schedule."""
    return NoiseSchedule(
        DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    )


@pytest.fixture
def gaussian(schedule: NoiseSchedule) -> Callable[[float], GaussianScore]:
    """Makes a `GaussianScore` of a given standard deviation."""
    return lambda std: GaussianScore(std, schedule)


def world_captions() -> list[str]:
    """Captions that contain every word of the world."""
    colours, things = list(COLOURS), list(OBJECTS)
    named = [(colours[i % len(colours)], thing) for i, thing in enumerate(things)]
    single = [
        view_prompt(f"{'an' if c[0] in 'aeiou' else 'a'} {c} {t}", VIEWS[i % 4])
        for i, (c, t) in enumerate(named)
    ]
    phrases = [phrase.format(thing="a red cube", bare="red cube") for phrase in PHRASES]
    views = [phrase.format(text="a red cube", view=VIEWS[0]) for phrase in VIEW_PHRASES]
    return [*single, *phrases, *views, *(f"a red cube {relation} a blue sphere" for relation in RELATIONS)]


def save_tiny_teacher(folder: Path, latent_channels: int, views: ViewTrainingOptions | None = None) -> Path:
    """A complete teacher folder, untrained, 64x64 images, 8x8 latents; with `views` of a multi-view one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer, vocabulary = build_tokenizer(world_captions())
        small = ClipOptions(width=32, layers=1, patch=16, text_width=32, text_layers=2, projection=16)
        clip = build_clip(small, tokenizer, 64)
        vae = build_vae(VaeOptions(channels=(8, 8, 16, 16), latent_channels=latent_channels), 64)
        vae.register_to_config(scaling_factor=1.7)  # other than 1, which would hide a missing factor
        options = UnetOptions(channels=(16, 32), heads=2, views=views)
        unet = build_unet(options, vae.config.latent_channels, 8, small.text_width, small.projection)
        save_teacher(folder, TeacherParts(tokenizer, vocabulary, clip, vae), unet, make_scheduler(options))
    return folder


@pytest.fixture(scope="session")
def tiny_teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with latents of 8 channels. Tests must not write to it."""
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny", 8)


@pytest.fixture(scope="session")
def multi_view_teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that takes cameras and pictures. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("teacher") / "multi_view"
    return save_tiny_teacher(folder, 8, ViewTrainingOptions(width=16))


@pytest.fixture
def tiny_teacher(tiny_teacher_folder: Path) -> LatentDiffusionTeacher:
    """The tiny teacher, loaded afresh."""
    return load_latent_diffusion(str(tiny_teacher_folder))
