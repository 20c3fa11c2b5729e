"""Particles on a Gaussian mixture as the subject of an ablation: exact scores, figures in closed form."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule
from distill.core.score import Prediction, ScoreModel
from distill.evaluation.ablation.plan import Cell, Figures, coverage
from distill.evaluation.metrics import divergence_from, wasserstein_2
from distill.objectives.algebra import ScoreDistillation
from distill.objectives.prompts import PromptConditionings
from distill.runtime.checkpoint import TensorState
from distill.runtime.optim import optimizer_step
from distill.runtime.precision import Precision
from distill.runtime.run import Run
from distill.teacher.mixture import Mixture, MixtureTeacher, ring

CPU = Precision(torch.device("cpu"), torch.float32)  # of the run; the particles are float64


@dataclass(frozen=True)
class ParticleOptions:
    """A ring of Gaussians, the particles on it, and their exact critic."""

    modes: int = 8
    classes: int = 4
    std: float = 0.08  # of a mode; the ring's radius is 1
    particles: int = 256
    learning_rate: float = 0.02  # of Adam
    kernel: float = 0.06  # std of the kernel density that the critic is the score of


@final
class ParticleCritic(ScoreModel):
    """The exact score of the particles' kernel density: what a fake-score network converges to."""

    def __init__(self, particles: nn.Parameter, kernel: float, schedule: NoiseSchedule) -> None:
        self.particles, self.kernel, self.schedule = particles, kernel, schedule

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """As of every score model; unconditional, whatever the conditioning."""
        means = self.particles.detach().double()
        count = len(means)
        weights = torch.full((count,), 1 / count, dtype=torch.float64)
        density = Mixture(means, torch.full_like(means, self.kernel), weights, ("kernel",) * count)
        uniform = Conditioning(weights[None, None]).expand(len(x_t))
        return MixtureTeacher(density, self.schedule).predict(x_t, t, uniform)


def run_particles(cell: Cell, options: ParticleOptions, schedule: NoiseSchedule) -> Figures:
    """Optimise particles, initially standard normal, by the cell's loss; its prompt is a class: c0 and so on.

    Figures: coverage of the class's modes, KL to it, W2 to exact samples and, as its floor, W2 between two
    exact sets.
    """
    teacher = MixtureTeacher(ring(options.modes, std=options.std, classes=options.classes), schedule)
    run = Run(cell.run_options(CPU), {"prompt": cell.prompt}, cell.loss)
    init = torch.randn(options.particles, *teacher.latent_shape, generator=run.generator, dtype=torch.float64)
    particles = nn.Parameter(init)
    optimizer = torch.optim.Adam([particles], lr=options.learning_rate)
    critic = ParticleCritic(particles, options.kernel, schedule) if cell.objective.needs_critic else None
    loss = ScoreDistillation(teacher, cell.objective, critic, decode=lambda latents: latents)
    cond, uncond = teacher.encode_text([cell.prompt]), teacher.encode_text([""])
    others = dict.fromkeys((*cell.objective.prompts, "critic"), uncond)
    conditionings = PromptConditionings({"conditional": cond, "unconditional": uncond, **others})
    run.track(particles=TensorState(particles), optimizer=optimizer)

    for step in run.steps():
        output = loss(particles, conditionings, step / cell.steps, run.generator)
        optimizer_step(optimizer, output.loss)
        run.log(g=output.gradient.square().mean().sqrt())

    points = particles.detach().flatten(1)
    generator = torch.Generator().manual_seed(cell.seed)
    exact, control = (teacher.sample(cond.expand(len(points)), generator).flatten(1) for _ in range(2))
    weights = cond.embedding[0, 0]
    seconds = run.seconds
    run.finish({})
    log_density = teacher.mixture.log_density(particles.detach(), weights)
    return {
        "coverage": coverage(points, teacher.mixture.means.flatten(1), options.std, weights),
        "kl": divergence_from(points, log_density),
        "w2": wasserstein_2(points, exact),
        "w2_floor": wasserstein_2(control, exact),
        "seconds": seconds,
    }
