"""Time a cycle of distillation against its floor: python scripts/bench_one_step.py method=dmd2 method.gan=null"""

from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    from distill.evaluation.judge import load_judge
    from distill.one_step.build import start
    from distill.one_step.timing import profile_cycle, time_cycle
    from distill.one_step.trainer import OneStepOptions
    from distill.runtime.config import build
    from distill.runtime.machine import machine_facts, pick_device
    from distill.runtime.run import Run, RunOptions
    from distill.teacher.latent import Teacher

    run = Run(build(RunOptions, config["run"], "run"), config, "bench")
    options = build(OneStepOptions, {**config["distill"], "method": config["method"]}, "distill")
    teacher = Teacher.load(config["teacher"], pick_device(config["run"]["device"]))
    task = start(run, teacher, load_judge(config["judge"]), config["data"], options)
    timings, ratio = time_cycle(task, config["runs"])
    for timing in timings:
        print(f"{timing.part:42} {timing.median:8.1f} ms  ({timing.low:.1f} to {timing.high:.1f})")
    print(
        f"a cycle states {task.nfe / run.options.steps:.4g} F a sample and takes {ratio:.3f} times as long as so many forward passes"
    )
    if config["profile"]:
        print(profile_cycle(task))
    print(machine_facts())


if __name__ == "__main__":
    entry("bench_one_step", main)
