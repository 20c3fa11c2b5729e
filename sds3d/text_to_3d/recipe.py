"""A run from a prompt or a picture to its files, for the command line, the benchmark and Python scripts."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from distill.core.teacher import Teacher
from distill.evaluation.clip import load_clip_scorer
from distill.objectives.options import ObjectiveOptions
from distill.runtime.config import as_mapping
from distill.runtime.errors import UserError
from distill.runtime.experiment import ExperimentInfo
from distill.runtime.precision import pick_precision
from distill.runtime.run import Run, RunOptions
from distill.teacher.load import load_teacher, require_latent
from distill.teacher.pictures import check_takes_pictures
from sds3d.export.export import ExportOptions, export_run
from sds3d.scene.nerf import NerfOptions
from sds3d.scene.protocol import SceneOptions
from sds3d.text_to_3d.caption import CaptionOptions, recognise, world_captions
from sds3d.text_to_3d.context import check_picture
from sds3d.text_to_3d.elevation import NFE, estimate_elevation, read_elevation
from sds3d.text_to_3d.mesh_control import MeshControl, MeshControlOptions
from sds3d.text_to_3d.picture import CutOut, load_cut_out
from sds3d.text_to_3d.reference_view import ImageTo3dOptions, ReferenceView
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions, check_inputs


@dataclass(frozen=True, kw_only=True)
class TextTo3dRecipe:
    """Everything a text-to-3D run depends on."""

    prompt: str  # repeated as text_to_3d.prompt; with an image it may be empty
    image: str | None = None  # a picture of one object, cut out or on a plain background: image to 3D
    teacher: str = "shapes64"  # a shipped name, a diffusers folder, a hub id, or a YAML file
    autoencoder: str | None = None  # a tiny one in place of the VAE: a folder, madebyollin/taesd
    run: RunOptions
    text_to_3d: TextTo3dOptions
    image_to_3d: ImageTo3dOptions = field(default_factory=ImageTo3dOptions)
    caption: CaptionOptions = field(default_factory=CaptionOptions)  # of pictures that have a caption
    scene: SceneOptions = field(default_factory=NerfOptions)
    objective: ObjectiveOptions
    control: MeshControlOptions | None = None
    export: ExportOptions = field(default_factory=ExportOptions)
    experiment: ExperimentInfo | None = None  # the description of the preset chosen by experiment=NAME

    def __post_init__(self) -> None:
        if self.image is not None and self.control is not None:
            raise UserError(
                f"image={self.image} and control.mesh={self.control.mesh} are given: both fix the shape, "
                "leave one of them out"
            )


Recipe = TypeVar("Recipe", bound=TextTo3dRecipe)


def with_caption(recipe: Recipe) -> Recipe:
    """The recipe with the picture's caption as its prompt, and with the options of a picture that has one.

    As it is without a picture, and where nothing says what the picture shows. A second call changes nothing.
    Raises `UserError` for a picture that cannot be used.
    """
    chosen = recipe.caption
    if recipe.image is None or not chosen.enabled:
        return recipe
    caption = recipe.text_to_3d.prompt
    if not caption:
        teacher = load_teacher(recipe.teacher)
        check_takes_pictures(teacher)
        clip = load_clip_scorer(teacher.name_or_path)
        picture = load_cut_out(recipe.image).picture(teacher.resolution)
        if clip is not None:
            caption = recognise(clip, picture, world_captions(teacher), chosen.min_similarity)
        if not caption:
            return recipe
        print(
            f"the picture shows {caption}, recognised by CLIP: views are sampled by this caption "
            "(caption.enabled=false: by the picture itself)"
        )
    options = replace(
        recipe.text_to_3d,
        prompt=caption,
        views_per_group=chosen.views_per_group,
        group_layout=chosen.group_layout,
        stages=chosen.stages,
    )
    run = replace(recipe.run, steps=chosen.steps)
    return replace(recipe, prompt=caption, run=run, text_to_3d=options)


def start_text_to_3d(recipe: TextTo3dRecipe) -> TextTo3d:
    """Load the teacher, claim the run's directory and build the trainer. Raises `UserError`."""
    recipe = with_caption(recipe)
    precision = pick_precision(recipe.run.device, recipe.run.precision)
    teacher = load_teacher(recipe.teacher, precision.device, precision.dtype, recipe.autoencoder)
    # The inputs first: mistakes leave no directory behind.
    check_inputs(teacher, recipe.text_to_3d, recipe.image is not None, recipe.control is not None)
    control = None
    if recipe.control is not None:
        control = MeshControl(require_latent(teacher), recipe.control)
    cut_out = None if recipe.image is None else read_picture(recipe, teacher, recipe.image)
    label = recipe.text_to_3d.prompt or Path(recipe.image or "").stem
    run = Run(recipe.run, as_mapping(recipe), label)
    reference = None if cut_out is None else make_reference(recipe, teacher, cut_out)
    return TextTo3d(run, teacher, recipe.scene, recipe.objective, recipe.text_to_3d, control, reference)


def read_picture(recipe: TextTo3dRecipe, teacher: Teacher, image: str) -> CutOut:
    """The picture of a run. Raises `UserError` for one that cannot be used, and a teacher that takes none."""
    check_takes_pictures(teacher)
    check_picture(recipe.text_to_3d, recipe.objective)
    return load_cut_out(image)


def make_reference(recipe: TextTo3dRecipe, teacher: Teacher, cut_out: CutOut) -> ReferenceView:
    """The picture; without a caption with the elevation of its camera, estimated where it is not given."""
    options = recipe.image_to_3d
    scorer = load_clip_scorer(teacher.name_or_path, device=teacher.device)
    clip = None if scorer is None else scorer.model
    elevation, nfe = options.elevation, 0
    if recipe.caption.enabled and recipe.text_to_3d.prompt:
        return ReferenceView(teacher, clip, cut_out, elevation or 0.0, options, has_caption=True)
    if elevation is None and options.elevation_judge is not None:
        elevation = read_elevation(options.elevation_judge, cut_out, teacher.device)
    elif elevation is None:
        picture = cut_out.picture(teacher.resolution)
        grey = picture.over(torch.full((1, 3), sum(recipe.text_to_3d.background) / 2))
        elevation = estimate_elevation(teacher, grey, recipe.text_to_3d.prompt, recipe.run.seed)
        nfe = NFE
    if options.elevation is None:
        print(
            f"elevation of the picture's camera: {elevation:.0f} degrees, estimated (image_to_3d.elevation)"
        )
    return ReferenceView(teacher, clip, cut_out, elevation, options, nfe)


def run_text_to_3d(recipe: TextTo3dRecipe) -> Path:
    """Optimise a scene, export it, and return the path of result.json in the run's directory.

    Of several processes the first exports.
    """
    trainer = start_text_to_3d(recipe)
    trainer.train()
    if not trainer.run.main:
        return trainer.run.directory / "result.json"
    return export_run(trainer, recipe.export)
