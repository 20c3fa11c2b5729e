"""Losses against each other at equal compute: python scripts/ablate.py subject=images "losses=[sds, csd, vsd]" """

from pathlib import Path
from typing import Any

from entry import entry, load_group


def main(config: dict[str, Any]) -> None:
    from distill.evaluation.ablation.images import picture
    from distill.evaluation.ablation.plan import AblationOptions, plan, run_cells
    from distill.evaluation.ablation.report import save_report
    from distill.objectives.options import ObjectiveOptions
    from distill.runtime.config import build
    from distill.runtime.machine import machine_facts

    options = build(AblationOptions, config["ablation"], "ablation")
    losses = {
        name: build(ObjectiveOptions, load_group("objective", name), f"objective {name}")
        for name in config["losses"]
    }
    folder = Path(config["output"])
    cells = list(plan(options, losses, folder))
    rows = run_cells(cells, bench(config))
    pictures = {
        f"{cell.loss}, {cell.prompt}, seed {cell.seed}": picture(cell)
        for cell in cells
        if picture(cell).is_file()
    }
    facts = {"subject": config["subject"], "budget_F": options.budget, **machine_facts()}
    save_report(
        folder, f"Losses on {config['subject']} at {options.budget} F a sample", rows, pictures, facts
    )
    print((folder / "table.md").read_text())
    print(f"written: {folder}: rows.json, rows.csv, table.md, index.html")


def bench(config: dict[str, Any]) -> Any:
    from distill.runtime.config import build
    from distill.runtime.errors import UserError

    if config["subject"] == "particles":
        from diffusers import DDPMScheduler

        from distill.core.noise import NoiseSchedule
        from distill.evaluation.ablation.particles import ParticleOptions, run_particles

        particles = build(ParticleOptions, config["particles"], "particles")
        stock = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        return lambda cell: run_particles(cell, particles, NoiseSchedule(stock.alphas_cumprod))
    from distill.apps.optimise_image import OptimiseImageOptions
    from distill.evaluation.ablation.images import Graders, run_images
    from distill.evaluation.judge import load_judge
    from distill.teacher.folder import load_clip
    from distill.teacher.latent import Teacher
    from sds3d.evaluation.ablation import run_scene
    from sds3d.scene.nerf import SceneOptions
    from sds3d.text_to_3d.trainer import TextTo3dOptions

    teacher = Teacher.load(config["teacher"])
    graders = Graders(load_clip(teacher.place), load_judge(config["judge"]))
    image = build(OptimiseImageOptions, {**config["optimise_image"], "prompt": ""}, "optimise_image")
    made = build(TextTo3dOptions, {**config["text_to_3d"], "prompt": ""}, "text_to_3d")
    scene = build(SceneOptions, config["scene"], "scene")
    if config["subject"] == "images":
        return lambda cell: run_images(cell, teacher, graders, image)
    if config["subject"] == "scenes":
        return lambda cell: run_scene(cell, teacher, graders, scene, made)
    raise UserError(f"subject is {config['subject']!r}: expected particles, images or scenes")


if __name__ == "__main__":
    entry("ablate", main)
