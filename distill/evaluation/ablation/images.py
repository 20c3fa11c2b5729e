"""Images as the subject of an ablation: a few latents or pixel images optimised by each loss, and graded."""

from dataclasses import replace
from pathlib import Path

from distill.apps.optimise_image import OptimiseImage, OptimiseImageOptions
from distill.core.teacher import Teacher
from distill.evaluation.ablation.plan import Cell, Figures
from distill.evaluation.graders import Graders, grade_images
from distill.evaluation.metrics import pixel_diversity
from distill.runtime.images import image_grid, save_png
from distill.runtime.run import Run


def run_images(cell: Cell, teacher: Teacher, graders: Graders, options: OptimiseImageOptions) -> Figures:
    """Optimise particles by the cell's loss in the cell's directory; returns their figures."""
    run = Run(cell.run_options(teacher.precision), {"prompt": cell.prompt, "loss": cell.loss}, cell.loss)
    task = OptimiseImage(run, teacher, cell.objective, replace(options, prompt=cell.prompt))
    images = task.train()
    seconds = run.seconds
    save_png(preview_path(cell), image_grid(images, min(len(images), 8)))
    figures = {
        **grade_images(images, [cell.prompt] * len(images), graders),
        "diversity": pixel_diversity(images),
        "seconds": seconds,
    }
    run.finish(figures)
    return figures


def preview_path(cell: Cell) -> Path:
    """The file of a cell's image grid."""
    return cell.directory / "images.png"
