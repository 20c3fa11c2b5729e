"""A one-step generator from a frozen teacher: python scripts/distill_one_step.py method=dmd2"""

from pathlib import Path
from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    from distill.evaluation.judge import load_judge
    from distill.one_step.build import start
    from distill.one_step.folder import save_student
    from distill.one_step.student import chosen_time
    from distill.one_step.trainer import OneStepOptions
    from distill.runtime import processes
    from distill.runtime.config import build
    from distill.runtime.machine import pick_device
    from distill.runtime.run import Run, RunOptions
    from distill.teacher.latent import Teacher

    processes.join()
    options = build(OneStepOptions, {**config["distill"], "method": config["method"]}, "distill")
    run_options = build(RunOptions, config["run"], "run")
    teacher = Teacher.load(config["teacher"], pick_device(run_options.device))
    run = Run(run_options, config, Path(run_options.directory).name)
    if run.main:
        print(chosen_time(teacher.schedule, options.student, teacher.score.prediction_type))
    task = start(run, teacher, load_judge(config["judge"]), config["data"], options)
    averaged, raw = task.train()
    if run.main:
        save_student(run.directory / "student", averaged, teacher)
        save_student(run.directory / "student_raw", raw, teacher)
    figures = task.monitor.look(task.samples())
    run.finish({**figures, "alarms": task.monitor.alarms, "forwards": task.nfe, "config": config})
    if run.main:
        print(
            f"written: {run.directory}/student (averaged), student_raw; Frechet distance {figures['frechet']:.3g}"
        )


if __name__ == "__main__":
    entry("distill_one_step", main)
