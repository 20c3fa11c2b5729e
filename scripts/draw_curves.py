"""Draw what runs have logged, such as their losses, into one picture.

python scripts/draw_curves.py outputs/digits
Two runs beside each other: python scripts/draw_curves.py outputs/a outputs/b "metrics=[loss]"
"""

from dataclasses import dataclass

from entry import entry

from distill.runtime.curves import draw_curves, read_curves


@dataclass(frozen=True, kw_only=True)
class Config:
    """Directories of runs, and which of their figures are drawn."""

    runs: tuple[str, ...]  # directories; or arguments without a name
    metrics: tuple[str, ...] = ()  # [loss]; empty: all
    output: str = "outputs/curves.png"


def main(config: Config) -> None:
    draw_curves({run: read_curves(run) for run in config.runs}, config.metrics, config.output)
    print(f"written: {config.output}")


if __name__ == "__main__":
    entry("draw_curves", Config, main, positional="runs")
