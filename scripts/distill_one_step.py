"""A one-step generator from a frozen teacher.

python scripts/distill_one_step.py method=dmd2
On several processes: torchrun --nproc-per-node 2 scripts/distill_one_step.py distill.accumulate=2
"""

from dataclasses import dataclass

from entry import entry

from distill.one_step.recipe import OneStepRecipe, run_one_step
from distill.runtime import processes


@dataclass(frozen=True, kw_only=True)
class Config(OneStepRecipe):
    """Everything a distillation depends on."""


def main(config: Config) -> None:
    metrics = run_one_step(config)
    if processes.rank() == 0:
        distance = f"; Frechet distance {metrics['frechet']:.3g}" if metrics else ""
        print(f"written: {config.run.directory}/student{distance}")


if __name__ == "__main__":
    processes.init()  # before options that depend on the number of processes are built
    entry("distill_one_step", Config, main)
