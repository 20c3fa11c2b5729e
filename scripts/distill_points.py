"""Every one-step method on a Gaussian mixture with exact scores, at equal NFE.

python scripts/distill_points.py
"""

from dataclasses import dataclass, field

from entry import entry, load_group

from distill.evaluation.ablation.points import distill_points
from distill.one_step.methods.base import MethodOptions
from distill.one_step.points import PointOptions

METHODS = (
    *("dmd", "dmd2", "f_distill", "diff_instruct", "ladd", "sid", "consistency"),
    *("truncated_consistency", "continuous_consistency", "mean_flow", "shortcut", "moment_matching"),
    *("progressive", "knowledge_distillation", "reflow"),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which methods, how often, and the mixture."""

    methods: tuple[str, ...] = METHODS  # decoupled_dmd without guidance is DMD2 without its GAN
    seeds: tuple[int, ...] = (0, 1, 2)
    output: str = "outputs/distill_points"
    points: PointOptions = field(default_factory=PointOptions)


def main(config: Config) -> None:
    methods = {
        name: load_group("method", name, MethodOptions)  # `_target_` is concrete
        for name in config.methods
    }
    print(distill_points(methods, config.seeds, config.points, config.output))
    print(f"written: {config.output}: rows.json, rows.csv, table.md, index.html")


if __name__ == "__main__":
    entry("distill_points", Config, main)
