"""Distillation on a closed-form teacher: exact scores, and a small network in the place of a U-Net for
student and critic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import final

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from distill.core.conditioning import Conditioning
from distill.core.sampling import sample_ode
from distill.core.score import Prediction
from distill.core.teacher import Teacher
from distill.data.latents import LatentCache
from distill.evaluation.ablation.plan import Figures, coverage
from distill.evaluation.metrics import divergence_from, moments, wasserstein_2
from distill.one_step.critic_diagnostics import CriticDiagnosticsOptions
from distill.one_step.methods.base import MethodOptions
from distill.one_step.monitor import Monitor, MonitorOptions
from distill.one_step.regression import Pairs
from distill.one_step.student import Student, StudentOptions
from distill.one_step.trainer import OneStep, OneStepOptions
from distill.runtime.optim import optimizer_step
from distill.runtime.run import Run, RunOptions
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.mixture import MixtureTeacher


@final
class PointNet(nn.Module):
    """A denoiser of points (B, 2, 1, 1) under class weights (B, 1, K), called as diffusers calls a U-Net."""

    def __init__(self, classes: int, width: int = 128) -> None:
        super().__init__()
        self.config = SimpleNamespace(cross_attention_dim=classes, time_cond_proj_dim=None)
        self.cond_proj: nn.Linear | None = None
        self.frequencies = 2.0 ** torch.arange(6) * math.pi / 1000
        self.conv_in = nn.Linear(2 + 12 + classes, width)
        self.down = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.mid_block = nn.Sequential(
            nn.Flatten(), nn.SiLU(), nn.Linear(width, width), nn.Unflatten(1, (width, 1, 1))
        )
        self.up = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.conv_out = nn.Linear(width, 2)

    def add_time_condition(self, dim: int) -> None:
        """A further input of so many numbers beside the time, without effect at first."""
        self.config.time_cond_proj_dim = dim
        self.cond_proj = nn.Linear(dim, self.conv_in.out_features, bias=False)
        nn.init.zeros_(self.cond_proj.weight)

    def limit_time_frequency(self, highest: float) -> None:
        """As of every denoiser."""
        self.frequencies = self.frequencies * (self.frequencies <= highest)

    @property
    def dtype(self) -> torch.dtype:
        """Of its parameters."""
        return self.conv_in.weight.dtype

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> SimpleNamespace:
        """The output (B, 2, 1, 1) as `.sample`."""
        angle = timestep[:, None].to(sample) * self.frequencies.to(sample)
        weights = encoder_hidden_states[:, 0].to(sample)
        first = self.conv_in(torch.cat([sample.flatten(1), angle.sin(), angle.cos(), weights], 1))
        if self.cond_proj is not None and timestep_cond is not None:
            first = first + self.cond_proj(timestep_cond)
        middle = self.mid_block(first + self.down(first))
        return SimpleNamespace(sample=self.conv_out(first + self.up(middle.flatten(1)))[..., None, None])


@final
class MixtureStudy(Teacher):
    """A mixture as a teacher to distil: exact predictions, and a fitted network that students and critics
    start from.

    Its latents are points, which encode and decode as they are.
    """

    def __init__(self, exact: MixtureTeacher, steps: int = 1500, seed: int = 0) -> None:
        self.exact, self.schedule, self.name_or_path = exact, exact.schedule, "mixture"
        self.scheduler = DDIMScheduler(
            trained_betas=self.schedule.betas(self.schedule.num_train_timesteps),
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=True,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.denoiser = UNetDenoiser(PointNet(len(exact.mixture.labels)), self.schedule, "v_prediction")
        self._fit(steps, torch.Generator().manual_seed(seed))
        self.denoiser.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(2, 1, 1)."""
        return self.exact.latent_shape

    @property
    def resolution(self) -> int:
        """1."""
        return 1

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Component weights (B, 1, K) of class names."""
        return self.exact.encode_text(prompts).apply(Tensor.float)

    def encode_images(self, images: Tensor) -> Tensor:
        """Points as they are."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Points as they are."""
        return latents

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """As of every score model, exact, with gradient in x_t."""
        return self.exact.predict(x_t, t, conditioning.apply(Tensor.double))

    def _fit(self, steps: int, generator: torch.Generator) -> None:
        cache = mixture_cache(self.exact, 4096, generator)
        optimizer = torch.optim.Adam(self.denoiser.parameters(), lr=2e-3)
        for _ in range(steps):
            index = torch.randint(len(cache), (256,), generator=generator)
            t = torch.randint(self.schedule.num_train_timesteps, (256,), generator=generator)
            noise = torch.randn(256, 2, 1, 1, generator=generator)
            conditioning = cache.conditioning_of(index)
            optimizer_step(optimizer, self.denoising_loss(cache.latents[index], noise, t, conditioning))


def mixture_cache(exact: MixtureTeacher, count: int, generator: torch.Generator) -> LatentCache:
    """Exact samples of every class as the data of a distillation; a caption is a class."""
    labels = sorted(set(exact.mixture.labels))
    conditioning = exact.encode_text([*labels, ""])
    caption = torch.randint(len(labels), (count,), generator=generator)
    latents = exact.sample(conditioning.select(caption), generator).float()
    return LatentCache(latents, conditioning.apply(Tensor.float), caption)


def point_monitor(cache: LatentCache, options: MonitorOptions) -> Monitor:
    """Compares points by their coordinates."""
    real = moments(cache.latents.flatten(1))
    return Monitor(real, 1.0, lambda points: (points.flatten(1), torch.ones(len(points))), options)


@torch.no_grad()
def grade_points(student: Student, exact: MixtureTeacher, seed: int = 0, count: int = 512) -> Figures:
    """Means over the classes of mode coverage, KL by nearest neighbours, W2 to exact samples, and W2's
    floor.
    """
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for label in sorted(set(exact.mixture.labels)):
        conditioning = exact.encode_text([label]).expand(count)
        noise = torch.randn(count, 2, 1, 1, generator=generator)
        points = student(noise, conditioning.apply(Tensor.float), generator)
        real, again = (exact.sample(conditioning, generator).flatten(1) for _ in range(2))
        weights = conditioning.embedding[0, 0]
        std = float(exact.mixture.stds.mean())
        rows.append(
            {
                "coverage": coverage(points.flatten(1), exact.mixture.means.flatten(1), std, weights),
                "kl": divergence_from(points.flatten(1), exact.mixture.log_density(points, weights)),
                "w2": wasserstein_2(points.flatten(1), real),
                "w2_floor": wasserstein_2(again, real),
            }
        )
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@dataclass(frozen=True)
class PointOptions:
    """The mixture, the compute of every method, and the learning rates of student and critic."""

    modes: int = 8
    classes: int = 4
    std: float = 0.08
    budget: int = 20_000  # U-Net work in F a sample
    batch: int = 128
    learning_rate: float = 1e-3
    critic_learning_rate: float = 2e-3
    # Of generator and discriminator: a point has two numbers, not a latent's thousand.
    gan_weights: tuple[float, float] = (3.0, 0.01)
    init_steps: int = 3000  # of the network that student and critic start from
    pairs: int = 4096


@torch.no_grad()
def point_pairs(
    study: MixtureStudy, cache: LatentCache, count: int, generator: torch.Generator, steps: int = 50
) -> Pairs:
    """Noise and the end of its exact ODE trajectory, by DDIM."""
    noise, indices = torch.randn(count, 2, 1, 1, generator=generator), torch.arange(count)
    latents = sample_ode(study, study.scheduler, cache.conditioning_of(indices), noise, steps).float()
    return Pairs(noise, latents, cache.conditioning, cache.caption[:count])


def run_points(
    study: MixtureStudy, method: MethodOptions, options: PointOptions, directory: Path, seed: int
) -> dict[str, float]:
    """Distil the mixture by a method within the budget, in a run of its own; the averaged student's
    figures.
    """
    cache = mixture_cache(study.exact, 8192, torch.Generator().manual_seed(seed + 5))
    method = method.unguided(options.critic_learning_rate, options.gan_weights)
    pairs: Pairs | None = None
    if method.needs_pairs:
        pairs = point_pairs(study, cache, options.pairs, torch.Generator().manual_seed(seed + 6))

    training = OneStepOptions(
        StudentOptions(sigma_max=None) if method.from_last_level else StudentOptions(),
        options.batch,
        learning_rate=options.learning_rate,
        final_lr_scale=0.1,
        ema=0.99,
        critic_diagnostics=CriticDiagnosticsOptions(every=0),
        monitor=MonitorOptions(every=10**6, max_fid_ratio=1e9, min_diversity_ratio=0.0),
    )

    def build(steps: int, folder: Path) -> OneStep:
        never = 10**9
        run_options = RunOptions(
            str(folder),
            steps,
            seed,
            trackers=(),
            preview_every=never,
            checkpoint_every=never,
            device=str(study.device),  # the networks of points are too small for a GPU
        )
        run = Run(run_options, {"steps": steps}, folder.name)
        return OneStep(
            run, study, cache, method, training, point_monitor(cache, training.monitor), pairs=pairs
        )

    cycle = build(100, directory / "cost").nfe / 100
    trainer = build(max(round(options.budget / cycle), 1), directory / "run")
    averaged, _ = trainer.train()
    trainer.run.finish({})
    facts = {"steps": trainer.run.options.steps, "nfe": trainer.nfe, "seconds": trainer.run.seconds}
    return {**facts, **grade_points(averaged, study.exact, seed)}
