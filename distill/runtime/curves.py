"""The curves of finished or running trainings, from their metrics.jsonl."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path

Curve = tuple[list[int], list[float]]  # steps and values


def read_curves(directory: Path | str) -> dict[str, Curve]:
    """Every logged number of a run by its name. Raises `UserError` where the directory holds no run."""
    path = Path(directory) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the directory of a run that has logged something")
    curves: dict[str, Curve] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name not in ("step", "seconds") and isinstance(value, int | float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves


def draw_curves(runs: Mapping[str, Mapping[str, Curve]], metrics: Sequence[str], path: Path | str) -> None:
    """A panel for each metric, a line for each run, by its name; a metric on a log scale where all are > 0.

    Raises `UserError` for a metric that no run has.
    """
    from matplotlib.figure import Figure

    available = sorted({name for curves in runs.values() for name in curves})
    chosen = list(metrics) or available
    missing = [name for name in chosen if name not in available]
    if missing or not chosen:
        raise UserError(f"no run has logged {', '.join(missing) or 'anything'}: there are {available}")
    figure = Figure(figsize=(5 * len(chosen), 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        lines = {run: curves[name] for run, curves in runs.items() if name in curves}
        for run, (steps, values) in lines.items():
            axis.plot(steps, values, label=run)
        if all(value > 0 for _, values in lines.values() for value in values):
            axis.set_yscale("log")
        axis.set(title=name, xlabel="steps")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
