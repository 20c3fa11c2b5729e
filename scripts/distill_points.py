"""Every method of distillation on the oracle, at equal work: python scripts/distill_points.py"""

from pathlib import Path
from typing import Any

from entry import entry, load_group


def main(config: dict[str, Any]) -> None:
    from diffusers import DDIMScheduler

    from distill.core.noise import NoiseSchedule
    from distill.evaluation.ablation.report import save_report
    from distill.one_step.points import MixtureStudy, PointOptions, run_points
    from distill.one_step.trainer import MethodOptions
    from distill.runtime.config import build
    from distill.runtime.files import read_json, write_json
    from distill.runtime.machine import machine_facts
    from distill.teacher.mixture import MixtureTeacher, ring

    options, folder = build(PointOptions, config["points"], "points"), Path(config["output"])
    methods = {
        name: build(MethodOptions, load_group("method", name), f"method {name}") for name in config["methods"]
    }
    stock = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    exact = MixtureTeacher(
        ring(options.modes, std=options.std, classes=options.classes), NoiseSchedule(stock.alphas_cumprod)
    )
    study, rows = MixtureStudy(exact, options.fitting), []
    for name, method in methods.items():
        for seed in config["seeds"]:
            path = folder / name / f"seed{seed}" / "row.json"
            if not path.is_file():
                write_json(
                    path,
                    {
                        "loss": name,
                        "guidance": None,
                        "prompt": "ring",
                        "seed": seed,
                        **run_points(study, method, options, path.parent, seed),
                    },
                )
            rows.append(read_json(path))
    save_report(
        folder, f"Distillation of a mixture at {options.budget} F a sample", rows, {}, machine_facts()
    )
    print((folder / "table.md").read_text())
    print(f"written: {folder}: rows.json, rows.csv, table.md, index.html")


if __name__ == "__main__":
    entry("distill_points", main)
