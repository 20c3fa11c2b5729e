"""One-step methods compared on a Gaussian mixture with exact scores, at equal NFE."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler

from distill.core.noise import NoiseSchedule
from distill.evaluation.ablation.report import save_report
from distill.evaluation.rows import RowJob, shared_rows
from distill.one_step.methods.base import MethodOptions
from distill.one_step.points import MixtureStudy, PointOptions, run_points
from distill.runtime.machine import machine_info
from distill.teacher.mixture import MixtureTeacher, ring


def distill_points(
    methods: Mapping[str, MethodOptions], seeds: Sequence[int], options: PointOptions, folder: Path | str
) -> str:
    """Run every method and seed that has no row in `folder` yet; writes the report, returns its table."""
    scheduler: Any = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    mixture = ring(options.modes, std=options.std, classes=options.classes)
    study = MixtureStudy(MixtureTeacher(mixture, NoiseSchedule(scheduler.alphas_cumprod)), options.init_steps)
    folder, jobs = Path(folder), []
    for name, method in methods.items():
        for seed in seeds:
            directory = folder / name / f"seed{seed}"
            query = {"loss": name, "guidance": None, "prompt": "ring", "seed": seed}
            compute = partial(run_points, study, method, options, directory, seed)
            jobs.append(RowJob(directory / "row.json", query, compute))
    rows = shared_rows(jobs, "methods")
    title = f"Distillation of a mixture at {options.budget} NFE a sample"
    save_report(folder, title, rows, {}, machine_info())
    return (folder / "table.md").read_text()
