"""A text-to-3D run from its options to its files, for the command line, the benchmark and Python scripts."""

from dataclasses import dataclass, field
from pathlib import Path

from distill.objectives.options import ObjectiveOptions
from distill.runtime.config import as_mapping
from distill.runtime.experiment import ExperimentInfo
from distill.runtime.precision import pick_precision
from distill.runtime.run import Run, RunOptions
from distill.teacher.load import load_teacher, require_latent
from sds3d.export.export import ExportOptions, export_run
from sds3d.scene.nerf import NerfOptions
from sds3d.scene.protocol import SceneOptions
from sds3d.text_to_3d.mesh_control import MeshControl, MeshControlOptions
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions, check_inputs


@dataclass(frozen=True, kw_only=True)
class TextTo3dRecipe:
    """Everything a text-to-3D run depends on."""

    prompt: str  # repeated as text_to_3d.prompt
    teacher: str = (
        "shapes64"  # a shipped name, a diffusers folder, or a hub id of Stable Diffusion 1.x or 2.x
    )
    run: RunOptions
    text_to_3d: TextTo3dOptions
    scene: SceneOptions = field(default_factory=NerfOptions)
    objective: ObjectiveOptions
    control: MeshControlOptions | None = None
    export: ExportOptions = field(default_factory=ExportOptions)
    experiment: ExperimentInfo | None = None  # the description of the preset chosen by experiment=NAME


def start_text_to_3d(recipe: TextTo3dRecipe) -> TextTo3d:
    """Load the teacher, claim the run's directory and build the trainer. Raises `UserError`."""
    precision = pick_precision(recipe.run.device, recipe.run.precision)
    teacher = load_teacher(recipe.teacher, precision.device, precision.dtype)
    check_inputs(teacher, recipe.text_to_3d)  # this and the mesh first: they leave no directory behind
    control = None
    if recipe.control is not None:
        control = MeshControl(require_latent(teacher), recipe.control)
    run = Run(recipe.run, as_mapping(recipe), recipe.text_to_3d.prompt)
    return TextTo3d(run, teacher, recipe.scene, recipe.objective, recipe.text_to_3d, control)


def run_text_to_3d(recipe: TextTo3dRecipe) -> Path:
    """Optimise a scene, export it, and return the path of result.json in the run's directory."""
    trainer = start_text_to_3d(recipe)
    trainer.train()
    return export_run(trainer, recipe.export)
