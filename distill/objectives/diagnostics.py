"""Diagnostics: the statistics of a loss's gradient over t, on latents that stay fixed."""

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
    """How often a run is diagnosed, at how many levels of t, with how many draws at each."""

    every: int = 0  # steps between two diagnoses; 0: never
    levels: int = 8
    draws: int = 8

    def __post_init__(self) -> None:
        if self.every < 0 or self.levels < 2 or self.draws < 2:
            raise UserError("diagnostics need every of at least 0, and at least 2 levels and 2 draws")


@dataclass(frozen=True)
class Diagnosis:
    """Statistics by level of t, L entries each.

    t_fraction: t / T. gradient_rms: of the mean g. signal_to_noise: |E g|^2 / E |g - E g|^2. cosine: of one
    draw with the mean, averaged. guidance_rms: of w s (eps_c - eps_0). denoising_rms: of w (eps_c - eps).
    """

    t_fraction: list[float]
    gradient_rms: list[float]
    signal_to_noise: list[float]
    cosine: list[float]
    guidance_rms: list[float]
    denoising_rms: list[float]


def at_timestep(options: ObjectiveOptions, t_fraction: float) -> ObjectiveOptions:
    """The objective with the time of every component fixed at one fraction of T."""
    time = TimestepSampler(t_fraction, (t_fraction, t_fraction))
    second = None if options.second is None else replace(options.second, time=time)
    return replace(options, time=time, second=second)


@torch.no_grad()
def diagnose(
    objective: ScoreDistillation, output: DistillationOutput, progress: float, options: DiagnosticOptions
) -> tuple[Diagnosis, Tensor]:
    """Statistics over the objective's own range of t, and x0 (L, B, C, h, w) of its first teacher term.

    It has a noise generator of its own, so that the diagnosed run is not changed.
    """
    sampler = objective.options.time
    critic = None if objective.critic is None else objective.critic.model
    levels = torch.linspace(sampler.low, sampler.upper(progress), options.levels).tolist()
    rows, x0 = [], []
    for t_fraction in levels:
        fixed = at_timestep(objective.options, t_fraction)
        loss = ScoreDistillation(objective.model.model, fixed, critic, objective.decode)
        generator = torch.Generator().manual_seed(0)
        outputs = [
            loss(output.clean, output.conditionings, progress, generator, reference=output.clean)
            for _ in range(options.draws)
        ]

        gradients = torch.stack([output.gradient for output in outputs]).flatten(2)  # (draws, B, N)
        mean = gradients.mean(0)
        noise = (gradients - mean).square().sum(2).mean() * options.draws / (options.draws - 1)
        # the mean of a few draws has noise of its own, which is subtracted
        signal = (mean.square().sum(1).mean() - noise / options.draws).clamp_min(0)
        cosine = torch.cosine_similarity(gradients, mean[None], dim=2).mean()

        predictions: Predictions = {("now", name): value for name, value in outputs[0].predictions.items()}
        parts = _split(objective.options, predictions, outputs[0].noise, progress)
        ratio = float(signal / noise.clamp_min(1e-20))
        rows.append((t_fraction, rms(mean), ratio, float(cosine), *parts))
        x0.append(guided_prediction(objective.options.teacher, predictions, progress).x0)
    return Diagnosis(*(list(column) for column in zip(*rows, strict=True))), torch.stack(x0)


def _split(
    component: LossComponent, predictions: Predictions, noise: Tensor, progress: float
) -> tuple[float, float]:
    """RMS of the guidance s (eps_c - eps_0) and of the denoising eps_c - eps of the first teacher term."""
    cond = predictions["now", component.teacher.prompt].eps
    guided = guided_prediction(component.teacher, predictions, progress).eps
    return rms(guided - cond), rms(cond - noise)


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


@torch.no_grad()
def diagnose_run(
    run: Run, objective: ScoreDistillation, output: DistillationOutput, options: DiagnosticOptions
) -> None:
    """Diagnose the step in progress and write the results, where one is due."""
    if not options.every or not run.due(options.every):
        return
    diagnosis, x0 = diagnose(objective, output, run.step / run.options.steps, options)
    images = x0 if objective.decode is None else torch.stack([objective.decode(level) for level in x0])
    save_diagnosis(run.directory, run.step + 1, diagnosis, images)


def save_diagnosis(folder: Path, step: int, diagnosis: Diagnosis, images: Tensor) -> None:
    """Write diagnostics/step_<step>.json, its plots as PNG, and the x0 predictions (L, B, 3, H, W), a row a
    sample.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = folder / "diagnostics"
    write_json(folder / f"step_{step:08d}.json", asdict(diagnosis))
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    panels = (("gradient_rms", "guidance_rms", "denoising_rms"), ("signal_to_noise",), ("cosine",))
    for axis, names in zip(axes, panels, strict=True):
        for name in names:
            axis.plot(diagnosis.t_fraction, asdict(diagnosis)[name], marker="o", label=name.replace("_", " "))
        axis.set_xlabel("t / T")
        axis.legend()
    with atomic_path(folder / f"step_{step:08d}.png") as temporary:
        figure.savefig(temporary, dpi=90)
    pyplot.close(figure)
    rows = images.transpose(0, 1).flatten(0, 1)  # the levels of a sample side by side
    save_png(folder / f"x0_{step:08d}.png", image_grid(rows, len(images)))
