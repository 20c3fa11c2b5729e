"""Ablations of losses: losses x guidance x prompts x seeds at equal NFE, one run per cell, in one table.

The subject of a cell is a function from the cell to its figures: particles on a mixture and images are in
this package, scenes in `sds3d.evaluation.ablation`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from distill.evaluation.rows import RowJob, shared_rows
from distill.objectives.options import LossComponent, ObjectiveOptions, Term
from distill.runtime.errors import UserError
from distill.runtime.names import slug
from distill.runtime.precision import Precision
from distill.runtime.run import RunOptions

Figures = dict[str, float]


@dataclass(frozen=True)
class Cell:
    """One run: a loss by name, its guidance scale (None: its own), prompt, seed, steps and directory."""

    loss: str
    objective: ObjectiveOptions
    guidance: float | None
    prompt: str
    seed: int
    steps: int
    directory: Path

    def run_options(self, precision: Precision) -> RunOptions:
        """Options of the cell's run: no trackers, previews or checkpoints; too short to compile for."""
        never = 10**9
        return RunOptions(
            str(self.directory),
            self.steps,
            self.seed,
            trackers=(),
            preview_every=never,
            checkpoint_every=never,
            device=str(precision.device),
            precision=precision.name,
            compile="off",
        )


Bench = Callable[[Cell], Figures]


@dataclass(frozen=True)
class AblationOptions:
    """What is compared. `budget` is the NFE a sample of every cell; a backward pass counts twice."""

    prompts: tuple[str, ...]
    guidance: tuple[float | None, ...] = (None,)
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: int = 800

    def __post_init__(self) -> None:
        if not (self.prompts and self.guidance and self.seeds) or self.budget < 1:
            raise UserError(
                "an ablation needs at least one prompt, guidance scale and seed, and a budget of at least 1"
            )


def with_guidance(objective: ObjectiveOptions, scale: float | None) -> ObjectiveOptions:
    """The objective with another scale for each guided term. Raises `UserError` where no term is guided."""
    if scale is None:
        return objective
    if not any(term.guided for component in objective.components for term in component.terms):
        raise UserError("guidance is varied, but a loss has no guided term: leave guidance=[null]")

    def scaled(component: LossComponent) -> tuple[Term, ...]:
        return tuple(replace(term, guidance=scale) if term.guided else term for term in component.terms)

    second = None if objective.second is None else replace(objective.second, terms=scaled(objective.second))
    return replace(objective, terms=scaled(objective), second=second)


def steps_within(objective: ObjectiveOptions, budget: int, resolution: int = 100) -> int:
    """The number of steps within a budget in NFE; a cost that varies over the run is averaged."""
    mean = sum(objective.cost((i + 0.5) / resolution) for i in range(resolution)) / resolution
    return max(round(budget / mean), 1)


def plan(options: AblationOptions, losses: Mapping[str, ObjectiveOptions], folder: Path) -> Iterator[Cell]:
    """Every cell, loss by loss, in folders named after it."""
    for name, objective in losses.items():
        for scale in options.guidance:
            scaled = with_guidance(objective, scale)
            steps = steps_within(scaled, options.budget)
            loss_folder = folder / f"{name}{'' if scale is None else f'-s{scale:g}'}"
            for prompt in options.prompts:
                for seed in options.seeds:
                    directory = loss_folder / f"{slug(prompt)}-seed{seed}"
                    yield Cell(name, scaled, scale, prompt, seed, steps, directory)


def run_cells(cells: Sequence[Cell], bench: Bench) -> list[dict[str, object]]:
    """The rows of all cells; one without its row in its directory is run, by one of any number of processes
    (`shared_rows`).
    """
    jobs = []
    for cell in cells:
        query = {"loss": cell.loss, "guidance": cell.guidance, "prompt": cell.prompt, "seed": cell.seed}
        query |= {"steps": cell.steps, "nfe": cell.objective.total_cost(cell.steps)}
        jobs.append(RowJob(cell.directory / "row.json", query, partial(bench, cell)))
    return shared_rows(jobs, "ablation")


@dataclass(frozen=True)
class Summary:
    """Mean and half-width of the 95 % interval of each figure over the runs of a loss at a guidance scale."""

    loss: str
    guidance: float | None
    runs: int
    figures: dict[str, tuple[float, float]]


def columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Every name in the rows, in order of appearance; not all rows have every figure."""
    return list(dict.fromkeys(name for row in rows for name in row))


def summarise(rows: Sequence[Mapping[str, object]]) -> list[Summary]:
    """Rows grouped by loss and guidance, in order of appearance."""
    groups: dict[tuple[object, object], list[Mapping[str, object]]] = {}
    for row in rows:
        groups.setdefault((row["loss"], row["guidance"]), []).append(row)
    summaries = []
    for (loss, guidance), members in groups.items():
        names = [name for name in columns(members) if name not in ("loss", "guidance", "prompt", "seed")]
        figures = {
            name: interval([float(str(member[name])) for member in members if name in member])
            for name in names
        }
        summaries.append(
            Summary(str(loss), None if guidance is None else float(str(guidance)), len(members), figures)
        )
    return summaries


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval of the mean by Student's t; the width of one value is nan."""
    from scipy.stats import t as student_t

    data = torch.tensor(values, dtype=torch.float64)
    if len(data) < 2:
        return float(data.mean()), float("nan")
    return float(data.mean()), float(student_t.ppf(0.975, len(data) - 1)) * float(data.std()) / len(
        data
    ) ** 0.5


def coverage(points: Tensor, means: Tensor, std: float, weights: Tensor) -> float:
    """The fraction of modes (K, D) with a weight that the points (N, D) cover.

    A mode is covered where more than a quarter of its weight in points lies within 3 std of its mean.
    """
    positive = weights > 0
    near = (torch.cdist(points.double(), means[positive].double()) < 3 * std).double().mean(0)
    return float((near > weights[positive] / 4).double().mean())
