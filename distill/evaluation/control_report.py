"""What an adapter's training tells: its fidelity over the steps as a plot, the step where it learnt to obey, result.json."""

import json
from pathlib import Path
from typing import Any

from distill.evaluation.fidelity import jump
from distill.runtime.files import atomic_path
from distill.runtime.run import Run

FIGURES = ("silhouette_iou", "depth_correlation", "line_f1")


def curves(metrics: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of every fidelity in a run's metrics.jsonl."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found = {name: [(row["step"], row[name]) for row in rows if name in row] for name in FIGURES}
    return {
        name: ([step for step, _ in points], [value for _, value in points])
        for name, points in found.items()
        if points
    }


def finish(run: Run) -> dict[str, float]:
    """Write fidelity.png and result.json; the last figures."""
    told = curves(run.directory / "metrics.jsonl")
    last = {name: values[-1] for name, (_, values) in told.items()}
    jumps = {name: jump(steps, values) for name, (steps, values) in told.items()}
    if told:
        plot(run.directory / "fidelity.png", told, jumps)
    run.finish({"fidelity": last, "learnt_to_obey_at": jumps})
    return last


def plot(path: Path, told: dict[str, tuple[list[int], list[float]]], jumps: dict[str, int | None]) -> None:
    """The curves, a dotted line where each one jumps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    for number, (name, (steps, values)) in enumerate(told.items()):
        colour = f"C{number}"
        axis.plot(steps, values, ".-", color=colour, label=name.replace("_", " "))
        at: Any = jumps[name]
        if at is not None:
            axis.axvline(at, color=colour, linestyle=":", linewidth=1)
            axis.annotate(
                f"step {at}",
                (at, values[steps.index(at)]),
                xytext=(6, -4),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    axis.set_xlabel("steps")
    axis.legend(fontsize=8, loc="lower right")
    axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
