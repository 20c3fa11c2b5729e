"""Particles on a Gaussian mixture, driven by any objective: where a loss ends can be told by arithmetic."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from distill.core.noise import NoiseSchedule
from distill.core.score import Prediction, ScoreModel
from distill.evaluation.ablation.plan import Cell, Figures, coverage
from distill.evaluation.metrics import divergence_from, wasserstein_2
from distill.objectives.algebra import PromptConditionings, ScoreDistillation
from distill.runtime.run import Run, RunOptions
from distill.teacher.mixture import Mixture, MixtureTeacher, ring


@dataclass(frozen=True)
class ParticleOptions:
    """The ring's modes and classes, how many particles, Adam's rate, and the particle critic's kernel."""

    modes: int = 8
    classes: int = 4
    std: float = 0.08
    particles: int = 256
    learning_rate: float = 0.02
    kernel: float = 0.06


@final
class ParticleCritic(ScoreModel):
    """The exact score of the particles themselves, seen as a mixture of kernels: what a critic learns in the limit."""

    def __init__(self, particles: nn.Parameter, kernel: float, schedule: NoiseSchedule) -> None:
        self.particles, self.kernel, self.schedule = particles, kernel, schedule

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """As the contract says; the condition changes nothing."""
        means = self.particles.detach().double()
        count = len(means)
        weights = torch.full((count,), 1 / count, dtype=torch.float64)
        own = MixtureTeacher(
            Mixture(means, torch.full_like(means, self.kernel), weights, ("own",) * count), self.schedule
        )
        return own.predict(x_t, t, weights[None, None].expand(len(x_t), 1, count))


def run_particles(cell: Cell, options: ParticleOptions, schedule: NoiseSchedule) -> Figures:
    """Drive particles from a wide normal by the cell's loss; its prompt is a class, c0 and so on.

    Coverage of the class's modes, KL to it (nearest neighbours), W2 to exact samples of it with the floor of two exact sets.
    """
    teacher = MixtureTeacher(ring(options.modes, std=options.std, classes=options.classes), schedule)
    run = Run(
        RunOptions(str(cell.directory), cell.steps, cell.seed, trackers=(), preview_every=10**9),
        {"prompt": cell.prompt},
        cell.loss,
    )
    start = torch.randn(
        options.particles, *teacher.latent_shape, generator=run.generator, dtype=torch.float64
    )
    particles = nn.Parameter(start)
    optimizer = torch.optim.Adam([particles], lr=options.learning_rate)
    critic = ParticleCritic(particles, options.kernel, schedule) if cell.objective.needs_critic else None
    loss = ScoreDistillation(teacher, cell.objective, critic, decode=lambda latents: latents)
    text, free = teacher.encode_text([cell.prompt]), teacher.encode_text([""])
    conditions = PromptConditionings(
        {
            "conditional": text,
            "unconditional": free,
            **dict.fromkeys((*cell.objective.prompts, "critic"), free),
        }
    )
    run.track(particles=nn.ParameterList([particles]), optimizer=optimizer)
    for step in run.steps():
        outcome = loss(particles, conditions, step / cell.steps, run.generator)
        optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()
        optimizer.step()
        run.log(g=outcome.gradient.square().mean().sqrt())
    points = particles.detach().flatten(1)
    generator = torch.Generator().manual_seed(cell.seed)
    exact, again = (teacher.sample(text.expand(len(points), -1, -1), generator).flatten(1) for _ in range(2))
    weights = text[0, 0]
    seconds = run.seconds
    run.finish({})
    clean = teacher.mixture.log_density(particles.detach(), weights)
    return {
        "coverage": coverage(points, teacher.mixture.means.flatten(1), options.std, weights),
        "kl": divergence_from(points, clean),
        "w2": wasserstein_2(points, exact),
        "w2_floor": wasserstein_2(again, exact),
        "seconds": seconds,
    }
