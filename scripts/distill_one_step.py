"""A one-step generator from a frozen teacher.

python scripts/distill_one_step.py method=dmd2
On several processes: torchrun --nproc-per-node 2 scripts/distill_one_step.py distill.accumulate=2
"""

from dataclasses import dataclass
from pathlib import Path

from entry import entry

from distill.one_step.recipe import OneStepRecipe, run_one_step
from distill.planning.one_step import one_step_subject
from distill.planning.start import plan_start, record_work


@dataclass(frozen=True, kw_only=True)
class Config(OneStepRecipe):
    """Everything a distillation depends on."""


def main(config: Config) -> None:
    plan = plan_start(one_step_subject(config), config)
    metrics = run_one_step(config)
    record_work(Path(config.run.directory) / "result.json", plan)
    distance = f"; Frechet distance {metrics['frechet']:.3g}" if metrics else ""
    print(f"written: {config.run.directory}/student{distance}")


if __name__ == "__main__":
    entry("distill_one_step", Config, main, parallel=True)
