"""Time a cycle of distillation against its floor, or count its work, without weights or data.

python scripts/bench_one_step.py method=dmd2 method.gan=null
python scripts/bench_one_step.py count=true teacher=stable-diffusion-v1-5/stable-diffusion-v1-5
"""

from dataclasses import dataclass

from entry import entry

from distill.one_step.recipe import OneStepRecipe, build_trainer
from distill.one_step.timing import profile_cycle, time_cycle
from distill.planning.cycle_work import cycle_work
from distill.runtime.machine import machine_info


@dataclass(frozen=True, kw_only=True)
class Config(OneStepRecipe):
    """A distillation of which single cycles are timed."""

    runs: int = 5  # repetitions of each part; the median is printed
    profile: bool = False  # where a cycle's time goes, by torch's profiler
    count: bool = False  # its floating-point operations, counted on the meta device, in place of its time


def main(config: Config) -> None:
    if config.count:
        for work in cycle_work(config):
            counted = f"{work.counted:.4g} NFE a sample are counted, {work.stated:.4g} stated"
            print(f"cycle {work.step}: {counted} ({work.ratio:.3f})")
        return
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
