"""Scenes as the subject of an ablation of losses: a text-to-3D run per cell, graded on a ring of views."""

from dataclasses import replace

from trimesh import Trimesh

from distill.core.teacher import Teacher
from distill.evaluation.ablation.images import preview_path
from distill.evaluation.ablation.plan import Cell, Figures
from distill.evaluation.graders import Graders, grade_images
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid, save_png
from distill.runtime.machine import peak_memory
from distill.runtime.run import Run
from sds3d.evaluation.benchmark import ELEVATION, grade_scene
from sds3d.evaluation.subjects import Subject, has_truth
from sds3d.export.turntable import GREY, render_views
from sds3d.scene.cameras import ring
from sds3d.scene.protocol import MeshOptions, Scene3D, SceneOptions
from sds3d.text_to_3d.context import camera_prompts
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions


def run_scene(
    cell: Cell,
    teacher: Teacher,
    graders: Graders,
    scene: SceneOptions,
    options: TextTo3dOptions,
    views: int = 8,
) -> Figures:
    """Optimise a scene by the cell's loss and grade `views` renders, each against the prompt of its view.

    For a prompt about the world, the scene and its mesh are graded against the truth as well.
    """
    options = replace(options, prompt=cell.prompt)
    run = Run(cell.run_options(teacher.precision), {"prompt": cell.prompt, "loss": cell.loss}, cell.loss)
    result = TextTo3d(run, teacher, scene, cell.objective, options).train()
    seconds = run.seconds

    cameras = ring(views, ELEVATION, teacher.resolution)
    images = render_views(result, cameras, GREY).rgb
    save_png(preview_path(cell), image_grid(images, views))
    prompts = camera_prompts(replace(options, view_words=True), cameras)
    figures = {**grade_images(images, prompts, graders), "seconds": seconds, **peak_memory()}
    if has_truth(cell.prompt):
        figures |= grade_scene(result, _mesh(result), Subject(cell.prompt), teacher.resolution, graders)[0]
    run.finish(figures)
    return figures


def _mesh(scene: Scene3D) -> Trimesh | None:
    """The scene's mesh with vertex colours; None where it has no surface."""
    try:
        return scene.extract_mesh(MeshOptions()).mesh
    except UserError:
        return None
