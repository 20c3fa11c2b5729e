"""Scenes as the subject of the bench of losses: one text-to-3D run a cell, graded on a ring of views."""

from dataclasses import replace

from distill.bench.ablation import Cell, Figures
from distill.bench.images import Graders, grade, picture
from distill.report import image_grid, peak_memory, save_png
from distill.run import Run, RunOptions
from distill.teacher.frozen import Teacher
from sds3d.cameras import ring
from sds3d.export import GREY
from sds3d.prompts import view_of, view_prompt
from sds3d.scene import SceneOptions
from sds3d.text_to_3d import TextTo3d, TextTo3dOptions
from sds3d.turntable import render_views

ELEVATION = 20.0


def run_scene(cell: Cell, teacher: Teacher, graders: Graders, scene: SceneOptions, options: TextTo3dOptions, views: int = 8) -> Figures:
    """Optimise a scene by the cell's loss and grade `views` renders of it, each against the prompt of its view."""
    run_options = RunOptions(str(cell.directory), cell.steps, cell.seed, trackers=(), preview_every=10**9, checkpoint_every=10**9)
    run = Run(run_options, {"prompt": cell.prompt, "loss": cell.loss}, cell.loss)
    made = TextTo3d(run, teacher, scene, cell.objective, replace(options, prompt=cell.prompt)).train()
    seconds = run.seconds
    cameras = ring(views, ELEVATION, teacher.resolution)
    images = render_views(made, cameras, GREY).rgb
    save_png(picture(cell), image_grid(images, views))
    prompts = [view_prompt(cell.prompt, view_of(azimuth, ELEVATION)) for azimuth in cameras.azimuth.tolist()]
    figures = {**grade(images, prompts, teacher, graders), "seconds": seconds, **peak_memory()}
    run.finish(figures)
    return figures
