"""Scenes as the subject of the bench of losses: one text-to-3D run a cell, graded on a ring of views, and against the true mesh."""

from dataclasses import replace

from trimesh import Trimesh

from distill.evaluation.ablation.images import Graders, grade, picture
from distill.evaluation.ablation.plan import Cell, Figures
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid, save_png
from distill.runtime.machine import peak_memory
from distill.runtime.run import Run, RunOptions
from distill.teacher.latent import Teacher
from sds3d.evaluation.benchmark import grade_scene, knows_truth
from sds3d.export.export import GREY
from sds3d.export.mesh import MeshOptions, extract_mesh
from sds3d.export.turntable import render_views
from sds3d.scene.cameras import ring
from sds3d.scene.nerf import Scene, SceneOptions
from sds3d.text_to_3d.prompts import view_of, view_prompt
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions

ELEVATION = 20.0


def run_scene(
    cell: Cell,
    teacher: Teacher,
    graders: Graders,
    scene: SceneOptions,
    options: TextTo3dOptions,
    views: int = 8,
) -> Figures:
    """Optimise a scene by the cell's loss and grade `views` renders of it, each against the prompt of its view.

    Where the prompt is of the world, the scene and its mesh are graded against the truth as well.
    """
    run_options = RunOptions(
        str(cell.directory), cell.steps, cell.seed, trackers=(), preview_every=10**9, checkpoint_every=10**9
    )
    run = Run(run_options, {"prompt": cell.prompt, "loss": cell.loss}, cell.loss)
    made = TextTo3d(run, teacher, scene, cell.objective, replace(options, prompt=cell.prompt)).train()
    seconds = run.seconds
    cameras = ring(views, ELEVATION, teacher.resolution)
    images = render_views(made, cameras, GREY).rgb
    save_png(picture(cell), image_grid(images, views))
    prompts = [view_prompt(cell.prompt, view_of(azimuth, ELEVATION)) for azimuth in cameras.azimuth.tolist()]
    figures = {**grade(images, prompts, teacher, graders), "seconds": seconds, **peak_memory()}
    if knows_truth(cell.prompt):
        figures |= grade_scene(made, mesh_of(made), cell.prompt, teacher, graders)[0]
    run.finish(figures)
    return figures


def mesh_of(scene: Scene) -> Trimesh | None:
    """The scene's mesh with vertex colours; None where it has no surface."""
    try:
        return extract_mesh(scene, MeshOptions()).mesh
    except UserError:
        return None
