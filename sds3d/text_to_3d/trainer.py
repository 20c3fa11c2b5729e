"""Text-to-3D: a scene optimised from a prompt, or from a picture, by a list of stages."""

from dataclasses import dataclass, field
from typing import final

import torch

from distill.core.teacher import Teacher
from distill.objectives.options import ObjectiveOptions
from distill.runtime.errors import UserError
from distill.runtime.run import Run
from sds3d.scene.cameras import ring
from sds3d.scene.protocol import RenderedViews, Scene3D, SceneOptions
from sds3d.text_to_3d.context import SharedOptions, TextTo3dContext
from sds3d.text_to_3d.mesh_control import MeshControl
from sds3d.text_to_3d.reference_view import ReferenceView
from sds3d.text_to_3d.stages.base import StageOptions
from sds3d.text_to_3d.stages.sdedit_refinement import SDEditRefinementOptions

PREVIEW_GREY = 0.85


def default_stages() -> dict[str, StageOptions]:
    """Views that a teacher with cameras samples from noise, then resamples from the scene fitted to them.

    In the manner of IM-3D (Melas-Kyriazi et al. 2024, arXiv:2402.08682). For other teachers give
    `ScoreDistillationOptions`, as configs/recipe/score_distillation.yaml does.
    """
    return {"sampled_views": SDEditRefinementOptions(strengths=(1.0, 0.5), start=0.0, views=48)}


@final
@dataclass(frozen=True)
class TextTo3dOptions(SharedOptions):
    """How a scene is optimised from a prompt. A stage takes over from those listed before it."""

    stages: dict[str, StageOptions] = field(default_factory=default_stages)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(stage.updates_from == 0 for stage in self.stages.values()):
            raise UserError(
                f"of the stages [{', '.join(self.stages)}] none updates the scene from the first step on: "
                "list score_distillation"
            )
        takeover, successor = 1.0, ""
        for name, stage in reversed(self.stages.items()):
            if stage.updates_from is not None:
                if stage.updates_from >= takeover:
                    raise UserError(
                        f"{name} never updates the scene, because {successor} takes over at {takeover:g} of "
                        f"the run: remove it (text_to_3d.stages.{name}=null), or let {successor} start later"
                    )
                takeover, successor = stage.updates_from, name
        fixed = [stage.fixed_pose_from for stage in self.stages.values() if stage.fixed_pose_from is not None]
        rotations = [fraction for stage in self.stages.values() for fraction in stage.rotates_at]
        if fixed and rotations and max(rotations) >= min(fixed):
            raise UserError(
                f"orientation is checked at {max(rotations):g} of the run, but refinement relies on the pose "
                f"from {min(fixed):g} on: check it before"
            )


def check_inputs(
    teacher: Teacher, options: TextTo3dOptions, picture: bool = False, control: bool = False
) -> None:
    """Raises `UserError` for a prompt that the teacher cannot encode, or that is empty without a picture.

    And for stages that need a teacher with cameras, unless `control` (a mesh) ties the views to each other.
    """
    for name, stage in options.stages.items():
        if stage.shape_from_views and not (teacher.conditioned_on_cameras or control):
            raise UserError(
                f"{name} samples all views from noise, and the teacher {teacher.name_or_path} is not "
                "conditioned on cameras, so that they would show different objects: give "
                "recipe=score_distillation"
            )
    if options.prompt or not picture:
        teacher.check_prompt(options.prompt)
    if options.negative_prompt:
        teacher.check_prompt(options.negative_prompt)


class TextTo3d:
    """A scene, its teacher and its stages; `train` runs the optimisation inside a `Run`."""

    def __init__(
        self,
        run: Run,
        teacher: Teacher,
        scene: SceneOptions,
        objective: ObjectiveOptions,
        options: TextTo3dOptions,
        control: MeshControl | None = None,
        reference: ReferenceView | None = None,
    ) -> None:
        """control: a coarse mesh that fixes the shape, through an adapter of the teacher; reference: a
        picture of the object (image to 3D).
        """
        self.run, self.teacher, self.options, self.reference = run, teacher, options, reference
        self.context = TextTo3dContext(run, teacher, scene, objective, options, control, reference)
        self.scene: Scene3D = self.context.scene
        self.stages = {name: stage.build(self.context) for name, stage in options.stages.items()}

    @property
    def updates(self) -> dict[str, range]:
        """The steps at which each stage updates the scene: until one listed after it takes over."""
        steps = self.run.options.steps
        result, end = {}, steps
        for name, stage in reversed(self.options.stages.items()):
            first = end if stage.updates_from is None else min(round(stage.updates_from * steps), end)
            result[name] = range(first, end)
            end = first
        return {name: result[name] for name in self.options.stages}

    @property
    def nfe(self) -> int:
        """NFE of the teacher over the whole run, in samples; the picture in a group of views is none."""
        elevation = 0 if self.reference is None else self.reference.nfe
        return elevation + sum(self.stages[name].nfe(len(steps)) for name, steps in self.updates.items())

    def train(self) -> Scene3D:
        """Optimise to the end of the run, with previews; returns the scene."""
        run = self.run
        run.track(scene=self.scene, optimizer=self.context.optimizer)
        if self.reference is not None:
            run.track(reference=self.reference)
        for name, stage in self.stages.items():  # several may be of one class
            run.track(**{f"{name}/{part}": value for part, value in stage.state().items()})
        for step in run.steps():
            self.context.align_picture(step)
            for stage in self.stages.values():
                stage.before_step(step)
            views = self.update(step)
            run.log(opacity=views.opacity.detach().mean())
            if run.due(run.options.preview_every):
                self.preview()
        return self.scene

    def update(self, step: int) -> RenderedViews:
        """One update of the scene, by the stage whose step it is."""
        name, steps = next((name, steps) for name, steps in self.updates.items() if step in steps)
        return self.stages[name].update(step, (step - steps.start) / len(steps))

    def preview(self) -> None:
        """Four views around the scene; with a picture also it and the view from its camera."""
        background = torch.full((4, 3), PREVIEW_GREY)
        views = self.scene.render(ring(4, resolution=self.teacher.resolution), background)
        self.run.preview("views", views.rgb)
        if self.reference is not None and self.reference.active:
            grey = background[:1].to(self.run.device)
            view = self.scene.render(self.reference.camera, grey).rgb
            self.run.preview("picture", torch.cat([self.reference.picture.over(grey), view]))
