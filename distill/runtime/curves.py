"""The curves of finished or running trainings, from their metrics.jsonl or from evaluations of snapshots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path

FIGURES = "figures"  # in a snapshot's folder: evaluations of it
REAL_FIGURES = "real-images.json"  # of evaluations: what does not depend on the generator
Curve = tuple[list[int], list[float]]  # steps and values


def read_curves(directory: Path | str) -> dict[str, Curve]:
    """Every logged number of a run by its name, or every figure of a folder of snapshots.

    Raises `UserError` where the directory holds neither.
    """
    path = Path(directory) / "metrics.jsonl"
    evaluated = sorted(Path(directory).glob(f"[0-9]*/{FIGURES}/*.json"))
    evaluated = [file for file in evaluated if file.name != REAL_FIGURES and file.parents[1].name.isdigit()]
    if evaluated and not path.is_file():
        return _snapshot_curves(evaluated)
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: give the directory of a run that has logged something, or of snapshots "
            f"with evaluations in STEP/{FIGURES}/"
        )
    curves: dict[str, Curve] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name not in ("step", "seconds") and isinstance(value, int | float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves


def _snapshot_curves(files: Sequence[Path]) -> dict[str, Curve]:
    """The figures of evaluations in STEP/figures/NAME.json, by the generator where a step has several."""
    curves: dict[str, Curve] = {}
    several = len({file.name for file in files}) > 1
    for file in files:
        row = json.loads(file.read_text(encoding="utf-8"))
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                steps, values = curves.setdefault(f"{name}, {file.stem}" if several else name, ([], []))
                steps.append(int(file.parents[1].name))
                values.append(value)
    return curves


def differing_parts(paths: Sequence[str]) -> list[str]:
    """Paths without the folders at their beginnings and ends that all share; one path is left whole."""
    parts = [Path(path).parts for path in paths]
    if len(set(parts)) < 2:
        return list(paths)
    levels = enumerate(zip(*parts, strict=False))
    start = next((i for i, level in levels if len(set(level)) > 1), min(map(len, parts)) - 1)
    ends = zip(*(reversed(names[start:]) for names in parts), strict=False)
    end = next((i for i, level in enumerate(ends) if len(set(level)) > 1), 0)
    return ["/".join(names[start : len(names) - end]) for names in parts]


def draw_curves(
    runs: Mapping[str, Mapping[str, Curve]],
    metrics: Sequence[str],
    path: Path | str,
    scales: Sequence[float] = (),
    label: str = "steps",
) -> None:
    """A panel for each metric, a line for each run, by `differing_parts`; a metric on a log scale where all
    are > 0.

    scales: of each run's steps, such as the work of one, for an axis with the `label` on a log scale. Raises
    `UserError` for a metric that no run has, and for scales that are not one a run.
    """
    from matplotlib.figure import Figure

    available = sorted({name for curves in runs.values() for name in curves})
    chosen = list(metrics) or available
    missing = [name for name in chosen if name not in available]
    if missing or not chosen:
        raise UserError(f"no run has logged {', '.join(missing) or 'anything'}: there are {available}")
    if scales and len(scales) != len(runs):
        raise UserError(f"{len(scales)} scales for {len(runs)} runs: give one a run")
    scale_of = dict(zip(runs, scales or [1.0] * len(runs), strict=True))
    label_of = dict(zip(runs, differing_parts(list(runs)), strict=True))
    figure = Figure(figsize=(5 * len(chosen), 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        lines = {run: curves[name] for run, curves in runs.items() if name in curves}
        for run, (steps, values) in lines.items():
            work = [scale_of[run] * step for step in steps]
            axis.plot(work, values, ".-" if scales else "-", label=label_of[run])
        if all(value > 0 for _, values in lines.values() for value in values):
            axis.set_yscale("log")
        axis.set(title=name, xlabel=label, xscale="log" if scales else "linear")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
