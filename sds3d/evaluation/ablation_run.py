"""The ablation from its options to its report: particles, images or scenes, by each loss at equal NFE."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffusers import DDPMScheduler

from distill.apps.optimise_image import OptimiseImageOptions
from distill.core.noise import NoiseSchedule
from distill.evaluation.ablation.images import preview_path, run_images
from distill.evaluation.ablation.particles import ParticleOptions, run_particles
from distill.evaluation.ablation.plan import AblationOptions, Bench, plan, run_cells
from distill.evaluation.ablation.report import save_report
from distill.evaluation.graders import load_graders
from distill.objectives.options import ObjectiveOptions
from distill.runtime.machine import machine_info
from distill.runtime.precision import PrecisionName, pick_precision
from distill.teacher.load import load_teacher
from sds3d.evaluation.ablation import run_scene
from sds3d.scene.nerf import NerfOptions
from sds3d.scene.protocol import SceneOptions
from sds3d.text_to_3d.trainer import TextTo3dOptions


@dataclass(frozen=True, kw_only=True)
class AblationRecipe:
    """What an ablation depends on beside its losses; each subject uses its own group of options."""

    subject: Literal["particles", "images", "scenes"] = "images"
    teacher: str = "shapes64"
    judge: str | None = "judge64"  # a shipped name or a folder; null leaves its figures out
    clip: str | None = (
        None  # a transformers CLIP model for the CLIP score; null: the teacher's own, where it has one
    )
    output: str
    device: str = "auto"  # auto: cuda when there is one; particles stay on the CPU
    precision: PrecisionName = "auto"  # of the networks; auto: bfloat16 on CUDA, float32 on a CPU
    ablation: AblationOptions
    particles: ParticleOptions = field(default_factory=ParticleOptions)
    optimise_image: OptimiseImageOptions
    text_to_3d: TextTo3dOptions
    scene: SceneOptions = field(default_factory=NerfOptions)


def run_ablation(recipe: AblationRecipe, losses: Mapping[str, ObjectiveOptions]) -> str:
    """Run every cell that has no row in the output folder yet; writes the report, returns its table."""
    options, folder = recipe.ablation, Path(recipe.output)
    cells = list(plan(options, losses, folder))
    rows = run_cells(cells, make_bench(recipe))
    previews = {f"{cell.loss}, {cell.prompt}, seed {cell.seed}": preview_path(cell) for cell in cells}
    previews = {name: path for name, path in previews.items() if path.is_file()}
    facts = {"subject": recipe.subject, "budget_nfe": options.budget, **machine_info()}
    title = f"Losses on {recipe.subject} at {options.budget} NFE a sample"
    save_report(folder, title, rows, previews, facts)
    return (folder / "table.md").read_text()


def make_bench(recipe: AblationRecipe) -> Bench:
    """The function that runs and grades one cell of the recipe's subject."""
    if recipe.subject == "particles":
        scheduler: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        schedule = NoiseSchedule(scheduler.alphas_cumprod)
        return lambda cell: run_particles(cell, recipe.particles, schedule)
    precision = pick_precision(recipe.device, recipe.precision)
    teacher = load_teacher(recipe.teacher, precision.device, precision.dtype)
    graders = load_graders(recipe.teacher, recipe.judge, recipe.clip, device=precision.device)
    if recipe.subject == "images":
        return lambda cell: run_images(cell, teacher, graders, recipe.optimise_image)
    return lambda cell: run_scene(cell, teacher, graders, recipe.scene, recipe.text_to_3d)
