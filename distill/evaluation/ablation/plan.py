"""The bench of losses: losses x guidance x prompts x seeds at equal compute, each cell a run of its own, all in one table.

What a cell is run on is a function from a cell to figures and a picture: particles on a mixture and images are here, scenes
in `sds3d.ablation`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from distill.objectives.options import LossComponent, ObjectiveOptions, Term
from distill.runtime.errors import UserError
from distill.runtime.files import read_json, write_json
from distill.runtime.names import slug

Figures = dict[str, float]


@dataclass(frozen=True)
class Cell:
    """One run: a loss as data under its name, its guidance (None: the loss's own), a prompt, a seed, its steps and directory."""

    loss: str
    objective: ObjectiveOptions
    guidance: float | None
    prompt: str
    seed: int
    steps: int
    directory: Path


Bench = Callable[[Cell], Figures]


@dataclass(frozen=True)
class AblationOptions:
    """What is compared. `budget` is the U-Net work of every cell, in forward passes a sample (F)."""

    prompts: tuple[str, ...]
    guidance: tuple[float | None, ...] = (None,)
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: int = 800

    def __post_init__(self) -> None:
        if not (self.prompts and self.guidance and self.seeds) or self.budget < 1:
            raise UserError(
                "an ablation needs prompts, guidance scales and seeds, at least one each, and a budget of at least 1"
            )


def with_guidance(objective: ObjectiveOptions, scale: float | None) -> ObjectiveOptions:
    """The objective with every guided term of the teacher at another scale. Raises `UserError` where no term is guided."""
    if scale is None:
        return objective
    if not any(term.guided for part in objective.parts for term in part.terms):
        raise UserError(
            "guidance is varied, but a loss has no guided term: its strength is in its coefficients; leave guidance=[null]"
        )

    def scaled(part: LossComponent) -> tuple[Term, ...]:
        return tuple(replace(term, guidance=scale) if term.guided else term for term in part.terms)

    second = None if objective.second is None else replace(objective.second, terms=scaled(objective.second))
    return replace(objective, terms=scaled(objective), second=second)


def steps_within(objective: ObjectiveOptions, budget: int, resolution: int = 100) -> int:
    """How many steps a budget of forward passes pays for; a cost that changes along the run is averaged."""
    mean = sum(objective.cost((i + 0.5) / resolution) for i in range(resolution)) / resolution
    return max(round(budget / mean), 1)


def plan(options: AblationOptions, losses: Mapping[str, ObjectiveOptions], folder: Path) -> Iterator[Cell]:
    """Every cell, loss by loss, in folders that name it."""
    for name, objective in losses.items():
        for scale in options.guidance:
            scaled = with_guidance(objective, scale)
            for prompt in options.prompts:
                for seed in options.seeds:
                    place = (
                        folder
                        / f"{name}{'' if scale is None else f'-s{scale:g}'}"
                        / f"{slug(prompt)}-seed{seed}"
                    )
                    yield Cell(name, scaled, scale, prompt, seed, steps_within(scaled, options.budget), place)


def run_cells(cells: Sequence[Cell], bench: Bench) -> list[dict[str, object]]:
    """Run what is not done yet, one cell after the other; a row a cell, from files where they stand."""
    rows = []
    for cell in tqdm(cells, desc="ablation", unit="run"):
        path = cell.directory / "row.json"
        if not path.is_file():
            figures = bench(cell)
            names = {"loss": cell.loss, "guidance": cell.guidance, "prompt": cell.prompt, "seed": cell.seed}
            cost = {"steps": cell.steps, "forwards": cell.objective.total_cost(cell.steps)}
            write_json(path, {**names, **cost, **figures})
        rows.append(read_json(path))
    return rows


@dataclass(frozen=True)
class Summary:
    """A loss at a guidance: over `runs` runs each figure's mean and half-width of its 95 % interval (Student's t; nan for one)."""

    loss: str
    guidance: float | None
    runs: int
    figures: dict[str, tuple[float, float]]


def columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Every name that a row has, in their order: not all prompts have every figure (a torus has no front)."""
    return list(dict.fromkeys(name for row in rows for name in row))


def summarise(rows: Sequence[Mapping[str, object]]) -> list[Summary]:
    """Rows by loss and guidance, in their order."""
    groups: dict[tuple[object, object], list[Mapping[str, object]]] = {}
    for row in rows:
        groups.setdefault((row["loss"], row["guidance"]), []).append(row)
    found = []
    for (loss, guidance), members in groups.items():
        names = [name for name in columns(members) if name not in ("loss", "guidance", "prompt", "seed")]
        figures = {
            name: interval([float(str(member[name])) for member in members if name in member])
            for name in names
        }
        found.append(
            Summary(str(loss), None if guidance is None else float(str(guidance)), len(members), figures)
        )
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval of the mean by Student's t; the width is nan for a single value."""
    from scipy.stats import t as student

    data = torch.tensor(values, dtype=torch.float64)
    if len(data) < 2:
        return float(data.mean()), float("nan")
    return float(data.mean()), float(student.ppf(0.975, len(data) - 1)) * float(data.std()) / len(data) ** 0.5


def coverage(points: Tensor, means: Tensor, std: float, weights: Tensor) -> float:
    """Share of the modes with a weight that have at least a quarter of their due of the points (N, D) within 3 std of their mean."""
    alive = weights > 0
    near = (torch.cdist(points.double(), means[alive].double()) < 3 * std).double().mean(0)
    return float((near > weights[alive] / 4).double().mean())
