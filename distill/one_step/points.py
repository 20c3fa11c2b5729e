"""Distillation on the oracle: a Gaussian mixture with exact scores, and a small network in the place of a U-Net for student and critic."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import final

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from distill.core.sampling import sample_ode
from distill.core.score import Prediction, ScoreModel
from distill.data.latents import LatentCache
from distill.evaluation.ablation.plan import Figures, coverage
from distill.evaluation.metrics import divergence_from, moments, wasserstein_2
from distill.objectives.options import CriticOptions
from distill.one_step.critic_diagnostics import LagOptions
from distill.one_step.monitor import Monitor, MonitorOptions
from distill.one_step.regression import Pairs, Regression
from distill.one_step.student import Student, StudentOptions
from distill.one_step.trainer import MethodOptions, OneStep, OneStepOptions
from distill.runtime.run import Run, RunOptions
from distill.teacher.latent import UNetDenoiser
from distill.teacher.mixture import MixtureTeacher
from distill.teacher.unet import denoising_loss


@final
class PointNet(nn.Module):
    """A denoiser of points (B, 2, 1, 1) under class weights (B, 1, K), called as diffusers calls a U-Net, with a `mid_block`."""

    def __init__(self, classes: int, width: int = 128) -> None:
        super().__init__()
        self.config = SimpleNamespace(cross_attention_dim=classes)
        self.frequencies = 2.0 ** torch.arange(6) * math.pi / 1000
        self.conv_in = nn.Linear(2 + 12 + classes, width)
        self.down = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.mid_block = nn.Sequential(
            nn.Flatten(), nn.SiLU(), nn.Linear(width, width), nn.Unflatten(1, (width, 1, 1))
        )
        self.up = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.conv_out = nn.Linear(width, 2)

    @property
    def dtype(self) -> torch.dtype:
        """Of its parameters."""
        return self.conv_in.weight.dtype

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        """The answer (B, 2, 1, 1) as `.sample`."""
        angle = timestep[:, None].to(sample) * self.frequencies.to(sample)
        told = torch.cat(
            [sample.flatten(1), angle.sin(), angle.cos(), encoder_hidden_states[:, 0].to(sample)], 1
        )
        first = self.conv_in(told)
        middle = self.mid_block(first + self.down(first))
        return SimpleNamespace(sample=self.conv_out(first + self.up(middle.flatten(1)))[..., None, None])


@final
class MixtureStudy(ScoreModel):
    """A mixture as a teacher to distil: exact answers, and a network fitted to it for student and critic to start from."""

    def __init__(self, exact: MixtureTeacher, steps: int = 1500, seed: int = 0) -> None:
        self.exact, self.schedule = exact, exact.schedule
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.unet = PointNet(len(exact.mixture.labels))
        self.score = UNetDenoiser(self.unet, self.schedule, "v_prediction")  # type: ignore[arg-type]
        self._fit(steps, torch.Generator().manual_seed(seed))
        self.unet.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """As the contract says, exactly, with gradient in x_t."""
        return self.exact.predict(x_t, t, condition.double())

    def _fit(self, steps: int, generator: torch.Generator) -> None:
        cache = mixture_cache(self.exact, 4096, generator)
        optimizer = torch.optim.Adam(self.unet.parameters(), lr=2e-3)
        for _ in range(steps):
            index = torch.randint(len(cache.latents), (256,), generator=generator)
            t = torch.randint(self.schedule.num_train_timesteps, (256,), generator=generator)
            noise = torch.randn(256, 2, 1, 1, generator=generator)
            batch = (cache.latents[index], noise, t, cache.states[cache.caption[index]])
            loss = denoising_loss(self.unet, self.schedule, batch, "v_prediction")  # type: ignore[arg-type]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


def mixture_cache(exact: MixtureTeacher, count: int, generator: torch.Generator) -> LatentCache:
    """Exact samples of every class as the data of a distillation; a caption is a class, the last state the whole mixture."""
    labels = sorted(set(exact.mixture.labels))
    states = exact.encode_text([*labels, ""])
    caption = torch.randint(len(labels), (count,), generator=generator)
    return LatentCache(exact.sample(states[caption], generator).float(), states.float(), caption)


def point_monitor(cache: LatentCache, options: MonitorOptions) -> Monitor:
    """Watches points as they are: the features are the coordinates."""
    return Monitor(
        moments(cache.latents.flatten(1)),
        lambda points: points,
        lambda points: points.flatten(1),
        lambda points: 1.0,
        options,
        {},
    )


@torch.no_grad()
def grade_points(student: Student, exact: MixtureTeacher, seed: int = 0, count: int = 512) -> Figures:
    """Over the classes, the mean of: coverage of the class's modes, KL to it by nearest neighbours, W2 to exact samples, and W2's floor."""
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for label in sorted(set(exact.mixture.labels)):
        states = exact.encode_text([label]).expand(count, -1, -1)
        points = student(torch.randn(count, 2, 1, 1, generator=generator), states.float(), generator)
        real, again = (exact.sample(states, generator).flatten(1) for _ in range(2))
        weights = states[0, 0]
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
    """The ring, the work of every method in F a sample, and the rates of student and critic."""

    modes: int = 8
    classes: int = 4
    std: float = 0.08
    budget: int = 20_000
    batch: int = 128
    learning_rate: float = 1e-3
    critic_rate: float = 2e-3
    adversary: tuple[float, float] = (
        3.0,
        0.01,
    )  # its weights on student and critic: a point has two numbers, not a latent's thousand
    fitting: int = 3000  # steps of the network that student and critic start from
    pairs: int = 4096


def unguided(method: MethodOptions, options: PointOptions) -> MethodOptions:
    """A method whose target is the mixture itself: no guidance, and without a sum of guidance alone; critics at the oracle's rate."""

    def plain(critic: CriticOptions | None) -> CriticOptions | None:
        return None if critic is None else replace(critic, learning_rate=options.critic_rate)

    objective = method.objective
    if objective is not None:
        terms = tuple(replace(term, guidance=1.0) if term.guided else term for term in objective.terms)
        objective = replace(objective, terms=terms, second=None, critic=plain(objective.critic))
    second = None if method.second_order is None else replace(method.second_order, guidance=1.0)
    consistency = None if method.consistency is None else replace(method.consistency, guidance=1.0)
    progressive = None if method.progressive is None else replace(method.progressive, guidance=1.0)
    parts = {
        "objective": objective,
        "second_order": second,
        "consistency": consistency,
        "progressive": progressive,
    }
    if method.gan is not None:
        parts["gan"] = replace(
            method.gan, generator=options.adversary[0], critic=options.adversary[1], high=1.0
        )
    return replace(method, **parts, critic=plain(method.critic))


@torch.no_grad()
def point_pairs(
    study: MixtureStudy, cache: LatentCache, count: int, generator: torch.Generator, steps: int = 50
) -> Pairs:
    """Noise and where the exact ODE takes it, by DDIM."""
    noise, caption = torch.randn(count, 2, 1, 1, generator=generator), cache.caption[:count]
    scheduler = DDIMScheduler(
        trained_betas=study.schedule.betas(study.schedule.num_train_timesteps),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    latents = sample_ode(study, scheduler, cache.states[caption], noise, steps).float()
    return Pairs(noise, latents, cache.states, caption)


def run_points(
    study: MixtureStudy, method: MethodOptions, options: PointOptions, directory: Path, seed: int
) -> dict[str, float]:
    """Distil the study by a method within the budget, in a run of its own; the grades of the averaged student."""
    cache = mixture_cache(study.exact, 8192, torch.Generator().manual_seed(seed + 5))
    chosen = unguided(method, options)
    regression = None
    if chosen.regression is not None:
        pairs = point_pairs(study, cache, options.pairs, torch.Generator().manual_seed(seed + 6))
        regression = Regression(
            pairs, replace(chosen.regression, distance="latents"), lambda latents: latents, None
        )
    trajectory = chosen.consistency is not None or chosen.progressive is not None
    watch = MonitorOptions(every=10**6, worse=1e9, collapse=0.0)
    student = StudentOptions(level=None if trajectory else 2.5)
    training = OneStepOptions(
        chosen,
        student,
        options.batch,
        learning_rate=options.learning_rate,
        lag=LagOptions(every=0),
        monitor=watch,
    )

    def task(steps: int, place: Path) -> OneStep:
        run = Run(
            RunOptions(str(place), steps, seed, trackers=(), preview_every=10**9, checkpoint_every=10**9),
            {"steps": steps},
            place.name,
        )
        return OneStep(run, study, cache, training, point_monitor(cache, watch), regression)

    cycle = task(100, directory / "cost").nfe / 100
    made = task(max(round(options.budget / cycle), 1), directory / "run")
    averaged, _ = made.train()
    facts = {"steps": made.run.options.steps, "forwards": made.nfe, "seconds": made.run.seconds}
    made.run.finish({})
    return {**facts, **grade_points(averaged, study.exact, seed)}
