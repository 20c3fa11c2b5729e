"""Instruments: what a loss does at each t, looked at on latents that hold still."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from distill.objectives.algebra import DistillationOutput, Predictions, ScoreDistillation, guided_prediction
from distill.objectives.options import LossComponent, ObjectiveOptions, TimestepSampler
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path, write_json
from distill.runtime.images import image_grid, save_png
from distill.runtime.run import Run


@dataclass(frozen=True)
class DiagnosticOptions:
    """How often a run looks (0: never), at how many levels of t, with how many draws at each."""

    every: int = 0
    levels: int = 8
    draws: int = 8

    def __post_init__(self) -> None:
        if self.every < 0 or self.levels < 2 or self.draws < 2:
            raise UserError("diagnostics need every of at least 0, and at least 2 levels and 2 draws")


@dataclass(frozen=True)
class Diagnosis:
    """By level (L entries each): t / T; the root mean square of the mean g; signal to noise |E g|^2 / E |g - E g|^2; the mean
    cosine of one draw with the mean; the rms of w s (eps_c - eps_0), the guidance, and of w (eps_c - eps), the denoising."""

    share: list[float]
    size: list[float]
    signal_to_noise: list[float]
    cosine: list[float]
    guidance: list[float]
    denoising: list[float]


def at_level(options: ObjectiveOptions, share: float) -> ObjectiveOptions:
    """The objective with every part's time held at one share of T."""
    law = TimestepSampler(share, (share, share))
    second = None if options.second is None else replace(options.second, time=law)
    return replace(options, time=law, second=second)


@torch.no_grad()
def diagnose(
    objective: ScoreDistillation, outcome: DistillationOutput, progress: float, options: DiagnosticOptions
) -> tuple[Diagnosis, Tensor]:
    """Figures of a step over the objective's own range of t, and x0 (L, B, C, h, w) of its first teacher term at each level.

    Draws its own noise, so that the run it looks at goes on unchanged.
    """
    law = objective.options.time
    latents, conditions = outcome.clean, outcome.conditions
    critic = None if objective.critic is None else objective.critic.model
    shares = torch.linspace(law.low, law.upper(progress), options.levels).tolist()
    rows, clean = [], []
    for share in shares:
        held = ScoreDistillation(
            objective.model.model, at_level(objective.options, share), critic, objective.decode
        )
        generator = torch.Generator().manual_seed(0)
        outcomes = [
            held(latents, conditions, progress, generator, reference=latents) for _ in range(options.draws)
        ]
        drawn = torch.stack([outcome.gradient for outcome in outcomes]).flatten(2)  # (draws, B, N)
        mean = drawn.mean(0)
        noise = (drawn - mean).square().sum(2).mean() * options.draws / (options.draws - 1)
        signal = (mean.square().sum(1).mean() - noise / options.draws).clamp_min(
            0
        )  # the mean's own noise taken off
        cosine = torch.cosine_similarity(drawn, mean[None], dim=2).mean()
        told: Predictions = {
            ("now", name): prediction for name, prediction in outcomes[0].predictions.items()
        }
        parts = _split(objective.options, told, outcomes[0].noise, progress)
        rows.append((share, rms(mean), float(signal / noise.clamp_min(1e-20)), float(cosine), *parts))
        clean.append(guided_prediction(objective.options.teacher, told, progress).x0)
    return Diagnosis(*(list(column) for column in zip(*rows, strict=True))), torch.stack(clean)


def _split(part: LossComponent, told: Predictions, noise: Tensor, progress: float) -> tuple[float, float]:
    """Sizes of the guidance s (eps_c - eps_0) and of the denoising eps_c - eps of the first teacher term."""
    bound = told["now", part.teacher.prompt].eps
    return rms(guided_prediction(part.teacher, told, progress).eps - bound), rms(bound - noise)


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


@torch.no_grad()
def look(
    run: Run, objective: ScoreDistillation, outcome: DistillationOutput, options: DiagnosticOptions
) -> None:
    """Diagnose the step in progress and write what was seen, where it is time to."""
    if not options.every or not run.due(options.every):
        return
    diagnosis, clean = diagnose(objective, outcome, run.step / run.options.steps, options)
    strips = clean if objective.decode is None else torch.stack([objective.decode(level) for level in clean])
    save_diagnosis(run.directory, run.step + 1, diagnosis, strips)


def save_diagnosis(folder: Path, step: int, diagnosis: Diagnosis, strips: Tensor) -> None:
    """Write diagnostics/step_<step>.json, its plots as PNG, and x0 predictions as strips: images (L, B, 3, H, W), one row a sample."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    place = folder / "diagnostics"
    write_json(place / f"step_{step:08d}.json", asdict(diagnosis))
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    panels = (("size", "guidance", "denoising"), ("signal_to_noise",), ("cosine",))
    for axis, names in zip(axes, panels, strict=True):
        for name in names:
            axis.plot(diagnosis.share, asdict(diagnosis)[name], marker="o", label=name.replace("_", " "))
        axis.set_xlabel("t / T")
        axis.legend()
    with atomic_path(place / f"step_{step:08d}.png") as temporary:
        figure.savefig(temporary, dpi=90)
    pyplot.close(figure)
    rows = strips.transpose(0, 1).flatten(0, 1)  # a sample's levels side by side
    save_png(place / f"x0_{step:08d}.png", image_grid(rows, len(strips)))
