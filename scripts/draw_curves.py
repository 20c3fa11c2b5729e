"""Draw what runs have logged, such as their losses, into one picture.

python scripts/draw_curves.py outputs/digits
Two runs beside each other: python scripts/draw_curves.py outputs/a outputs/b "metrics=[loss]"
Over work: python scripts/draw_curves.py outputs/a outputs/b "metrics=[frechet]" "scales=[15.2, 6]" label=NFE
"""

from dataclasses import dataclass

from entry import entry

from distill.runtime.curves import draw_curves, read_curves


@dataclass(frozen=True, kw_only=True)
class Config:
    """Directories of runs, and which of their figures are drawn."""

    # directories, or those of snapshots with evaluations in STEP/figures/; or arguments without a name
    runs: tuple[str, ...]
    metrics: tuple[str, ...] = ()  # [loss]; empty: all
    scales: tuple[float, ...] = ()  # one a run: what a step of it counts, such as its work; empty: 1
    label: str = "steps"  # of the axis below
    output: str = "outputs/curves.png"


def main(config: Config) -> None:
    runs = {run: read_curves(run) for run in config.runs}
    draw_curves(runs, config.metrics, config.output, config.scales, config.label)
    print(f"written: {config.output}")


if __name__ == "__main__":
    entry("draw_curves", Config, main, positional="runs")
