"""Time a cycle of distillation against its floor.

python scripts/bench_one_step.py method=dmd2 method.gan=null
"""

from dataclasses import dataclass

from entry import entry

from distill.one_step.recipe import OneStepRecipe, build_trainer
from distill.one_step.timing import profile_cycle, time_cycle
from distill.runtime.machine import machine_info


@dataclass(frozen=True, kw_only=True)
class Config(OneStepRecipe):
    """A distillation of which single cycles are timed."""

    runs: int = 5  # repetitions of each part; the median is printed
    profile: bool = False  # where a cycle's time goes, by torch's profiler


def main(config: Config) -> None:
    trainer = build_trainer(config)
    timings, ratio = time_cycle(trainer, config.runs)
    for timing in timings:
        print(f"{timing.name:42} {timing.median:8.1f} ms  ({timing.low:.1f} to {timing.high:.1f})")
    nfe = trainer.nfe / trainer.run.options.steps
    print(f"a cycle is {nfe:.4g} NFE a sample and takes {ratio:.3f} times as long as as many forward passes")
    if config.profile:
        print(profile_cycle(trainer))
    print(machine_info())


if __name__ == "__main__":
    entry("bench_one_step", Config, main)
