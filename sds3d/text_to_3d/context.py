"""What the stages of a text-to-3D run share: prompt, picture, cameras, teacher, critic, scene, optimizer."""

from dataclasses import dataclass, field, replace
from typing import Literal, final

import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.teacher import Teacher
from distill.core.views import POSE
from distill.data.images import BACKGROUND
from distill.objectives.critic import Critic
from distill.objectives.networks import prepare_networks
from distill.objectives.options import PERP_NEG_PROMPTS, ObjectiveOptions
from distill.objectives.prompts import PromptConditionings, encode_prompts
from distill.runtime import processes
from distill.runtime.errors import UserError
from distill.runtime.optim import optimizer_step
from distill.runtime.run import Run
from distill.runtime.transfer import upload
from distill.teacher.pictures import PictureCondition
from sds3d.scene.cameras import CameraOptions, Cameras
from sds3d.scene.protocol import RenderedViews, SceneOptions
from sds3d.scene.regularizers import RegularizerOptions
from sds3d.scene.shading import PointLights
from sds3d.text_to_3d.mesh_control import MeshControl
from sds3d.text_to_3d.prompts import CONTRAST_VIEWS, VIEWS, view_of, view_prompt
from sds3d.text_to_3d.reference_view import ReferenceView
from sds3d.text_to_3d.view_groups import sample_view_groups

CAMERA_DIM = 12  # size of `Cameras.poses`, which a critic is conditioned on


@dataclass(frozen=True)
class SharedOptions:
    """The options that all stages share."""

    prompt: str  # with a picture it may be empty
    negative_prompt: str = ""
    views: int = 4  # cameras a step; of score distillation, rounded up to whole groups
    view_words: bool = True  # view-dependent prompts: "..., front view"; with a picture never
    camera_condition: bool = True  # a teacher that is conditioned on cameras gets those of the views
    views_per_group: int = 4  # views that such a teacher denoises together (as MVDream); 1: each alone
    group_layout: Literal["ring", "random"] = (
        "ring"  # of a group's cameras: equal steps of azimuth at one elevation, or independent ones
    )
    camera: CameraOptions = field(default_factory=lambda: CameraOptions(elevation=(-10.0, 70.0)))
    background: tuple[float, float] = BACKGROUND  # grey levels of the views, as in the teacher's data
    background_replacement: float = (
        1.0  # probability of these greys a step; else views stand on the scene's own background
    )
    learning_rate: float = 0.03  # of what the scene stores by place, such as a feature grid
    mlp_learning_rate: float = 0.005
    adam_epsilon: float = 1e-15  # larger values freeze parameters with tiny gradients, such as empty space
    regularizers: RegularizerOptions = field(default_factory=RegularizerOptions)

    def __post_init__(self) -> None:
        if self.views < 1:
            raise UserError(f"views is {self.views}: at least 1 is needed")
        if self.views_per_group < 1:
            raise UserError(f"views_per_group is {self.views_per_group}: at least 1 is needed")
        if min(self.learning_rate, self.mlp_learning_rate, self.adam_epsilon) <= 0:
            raise UserError("learning_rate, mlp_learning_rate and adam_epsilon must be positive")
        if not 0 <= self.background[0] <= self.background[1] <= 1:
            raise UserError(
                f"background is {list(self.background)}: expected two grey levels in [0, 1], low then high"
            )
        if not 0 <= self.background_replacement <= 1:
            raise UserError(
                f"background_replacement is {self.background_replacement}: "
                "a probability in [0, 1] is expected"
            )


def check_view_words(teacher: Teacher, prompt: str) -> None:
    """Raise `UserError` for a teacher that knows a prompt's words and not those of its views."""
    teacher.check_prompt(prompt)
    try:
        for view in VIEWS:
            teacher.check_prompt(view_prompt(prompt, view))
    except UserError as error:
        raise UserError(f"{error}; set text_to_3d.view_words=false for prompts without views") from None


@final
class TextTo3dContext:
    """A scene under optimisation, and what its updates are computed from."""

    def __init__(
        self,
        run: Run,
        teacher: Teacher,
        scene: SceneOptions,
        objective: ObjectiveOptions,
        options: SharedOptions,
        control: MeshControl | None = None,
        reference: ReferenceView | None = None,
    ) -> None:
        """control: a coarse mesh that fixes the shape, through an adapter of the teacher; reference: a
        picture that the scene shows.
        """
        if reference is not None:
            check_picture(options, objective)
            if not reference.has_caption:  # nothing says which side of what a picture shows is its front
                options = replace(options, view_words=False)
        if options.view_words:
            check_view_words(teacher, options.prompt)
        self.run, self.teacher, self.options, self.control = run, teacher, options, control
        self.reference = reference
        self.conditioned_teacher = teacher if control is None else control.teacher
        self.camera_condition = options.camera_condition and self.conditioned_teacher.conditioned_on_cameras
        self.views_per_group = options.views_per_group if self.camera_condition else 1
        self.scene = scene.build(run.device)
        self.objective = objective
        critic = objective.critic
        self.critic = None if critic is None else Critic(teacher, critic, camera_dim=CAMERA_DIM)

        # Under mesh control the denoiser's conditions are other objects at every step.
        prepare_networks(run, teacher, self.critic, compile_denoiser=control is None)

        groups = self.scene.parameter_groups()
        by_role = {"explicit": options.learning_rate, "mlp": options.mlp_learning_rate}
        self.learning_rates = [by_role[group.role] * group.lr_scale for group in groups]
        self.optimizer = torch.optim.Adam(
            [
                {"params": group.parameters, "lr": rate}
                for group, rate in zip(groups, self.learning_rates, strict=True)
            ],
            betas=(0.9, 0.99),
            eps=options.adam_epsilon,
        )

    def whole_groups(self, views: int) -> int:
        """The number of views, rounded up to whole groups."""
        return -(-views // self.views_per_group) * self.views_per_group

    def sample_cameras(self, options: CameraOptions, count: int, resolution: int) -> Cameras:
        """Random cameras on the CPU, in groups of those whose views are denoised together."""
        layout, generator = self.options.group_layout, self.run.generator
        return sample_view_groups(options, count, self.views_per_group, layout, resolution, generator)

    def backgrounds(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Random grey backgrounds (count, 3) on the run's device, equal within a group of views.

        generator: by default the run's.
        """
        generator = self.run.generator if generator is None else generator
        greys = grey_backgrounds(self.options.background, count // self.views_per_group, generator)
        return upload(greys.repeat_interleave(self.views_per_group, 0), self.run.device)

    def training_backgrounds(self, count: int) -> Tensor | None:
        """Random greys, or None for the scene's own background, with which it is trained.

        threestudio replaces a learned background in the same way, lest it paint the object.
        """
        probability = self.options.background_replacement
        if probability < 1 and float(torch.rand((), generator=self.run.generator)) >= probability:
            return None
        return self.backgrounds(count)

    def set_cameras(self, cameras: Cameras) -> None:
        """Render the mesh control, where there is one, from the cameras of the teacher's next batches."""
        if self.control is not None:
            self.control.set_cameras(cameras.with_resolution(self.teacher.resolution))

    def with_cameras(
        self, conditioning: Conditioning, cameras: Cameras, picture: PictureCondition | None = None
    ) -> Conditioning:
        """A conditioning of one row, or of one a camera, with the cameras' poses, groups and picture.

        As it is where the teacher is not conditioned on cameras.
        """
        if not self.camera_condition:
            return conditioning
        poses = upload(cameras.view_poses(), self.run.device)
        if picture is not None:
            return picture.views(conditioning, poses.unflatten(0, (-1, self.views_per_group)))
        return conditioning.expand(len(cameras)).with_extras(**{POSE: poses}).grouped(self.views_per_group)

    def encode_picture(self, background: Tensor | None) -> PictureCondition | None:
        """What the teacher reads of the picture beside views over backgrounds (B, 3), by default a mean grey.

        None without a picture, and where a caption says what it shows.
        """
        if self.reference is None or self.reference.has_caption:
            return None
        if background is None:
            background = torch.full((1, 3), sum(self.options.background) / 2, device=self.run.device)
        return self.reference.condition(background[:: self.views_per_group])

    def of_object(self, name: str) -> bool:
        """Whether a prompt of the objective describes the object, not what guidance leads away from."""
        return name == "conditional" or "{prompt}" in self.objective.prompts.get(name, "")

    def encode_prompts(self, cameras: Cameras, background: Tensor) -> tuple[Conditioning, Conditioning]:
        """The conditioning of each camera's prompt, and the negative one, for views over backgrounds (B, 3).

        With a picture the negative one is that of no picture.
        """
        picture = self.encode_picture(background)
        cond = self.teacher.encode_text(camera_prompts(self.options, cameras))
        uncond = self.teacher.encode_text([self.options.negative_prompt])
        return (
            self.with_cameras(cond, cameras, picture),
            self.with_cameras(uncond, cameras, None if picture is None else picture.missing()),
        )

    def prompt_conditionings(self, cameras: Cameras, background: Tensor | None = None) -> PromptConditionings:
        """What the objective evaluates at cameras; with a critic also its prompt, the camera as an extra.

        background (B, 3): of the views, which the picture is given over too. All prompts have the same poses,
        the unconditional one too: guidance is by text (MVDream) and by the picture, which only prompts of
        the object have.
        """
        picture = self.encode_picture(background)
        missing = None if picture is None else picture.missing()
        conditionings = prompt_conditionings(self.teacher, self.options, self.objective, cameras)
        conditionings = PromptConditionings(
            {
                name: self.with_cameras(value, cameras, picture if self.of_object(name) else missing)
                for name, value in conditionings.by_name.items()
            }
        )
        if self.critic is None:
            return conditionings
        critic = conditionings.by_name["conditional"]
        if self.critic.options.camera:
            critic = critic.with_extras(camera=cameras.to(self.run.device).poses())
        return conditionings.updated(critic=critic)

    def render(
        self, cameras: Cameras, background: Tensor | None, lights: PointLights | None = None
    ) -> RenderedViews:
        """Views for training, in the run's precision; as `Scene3D.render`."""
        generator = self.run.generator
        with self.run.precision.autocast():
            return self.scene.render(cameras, background, generator, training=True, lights=lights)

    def regularization(
        self, views: RenderedViews, progress: float, options: RegularizerOptions | None = None
    ) -> Tensor:
        """The scene's penalties, by default those of the run's options."""
        weights = self.options.regularizers if options is None else options
        generator = processes.own_generator(self.run.generator)  # surface points depend on the views
        with self.run.precision.autocast():
            return self.scene.regularization(views, weights, progress, generator)

    def align_picture(self, step: int) -> None:
        """Align a picture with a caption to the scene, if it is due at a step."""
        reference = self.reference
        due = None if reference is None else reference.aligned_from(self.run.options.steps)
        if reference is not None and due is not None and step >= due and not reference.active:
            reference.align(self.scene)
            self.run.log(picture_azimuth=reference.azimuth, picture_elevation=reference.elevation)

    def reference_loss(self, reference: ReferenceView) -> Tensor:
        """The loss of the view from the picture's camera, over a random grey."""
        grey = grey_backgrounds(self.options.background, 1, self.run.generator)
        background = upload(grey, self.run.device)
        views = self.render(reference.camera, background)
        errors = reference.errors(views, background)
        weights = reference.weights(self.run.step / self.run.options.steps)
        self.run.log(**{name: error.detach() for name, error in errors.items()})
        return torch.stack([weights[name] * error for name, error in errors.items()]).sum()

    def optimizer_step(self, loss: Tensor) -> None:
        """One update of the scene by a stage's loss and, with a picture, that of its view."""
        if self.reference is not None and self.reference.active:
            loss = loss + self.reference_loss(self.reference)
        optimizer_step(self.optimizer, loss, scaler=self.run.scaler)

    def train_critic(self, latents: Tensor, conditionings: PromptConditionings) -> None:
        """Updates of the critic, where there is one, on latents (B, C, h, w) of the scene."""
        if self.critic is not None:
            conditioning = conditionings.by_name["critic"]
            self.critic.train_on(latents, conditioning, self.run.generator, self.run.scaler)


def check_picture(options: SharedOptions, objective: ObjectiveOptions) -> None:
    """Raise `UserError` for options under which a picture cannot be a condition."""
    if not options.camera_condition:
        raise UserError("camera_condition is false, but a picture is seen from a camera: give true")
    if options.background_replacement < 1:
        raise UserError(
            f"background_replacement is {options.background_replacement:g}, but a picture is given over the "
            "greys of the views: give 1"
        )
    if PERP_NEG_PROMPTS[0] in objective.prompt_names:
        raise UserError(
            "the objective contrasts view words, but nothing says what is the front of what a picture shows: "
            "choose an objective without perp_neg and contrast"
        )


def prompt_conditionings(
    teacher: Teacher, options: SharedOptions, objective: ObjectiveOptions, cameras: Cameras
) -> PromptConditionings:
    """The conditionings that an objective evaluates, one row a camera; for Perp-Neg two other views too."""
    conditionings = encode_prompts(
        teacher.encode_text, camera_prompts(options, cameras), objective, options.negative_prompt
    )
    if PERP_NEG_PROMPTS[0] not in objective.prompt_names:
        return conditionings

    contrast = [CONTRAST_VIEWS[view] for view in camera_views(cameras)]
    others = {
        name: teacher.encode_text([view_prompt(options.prompt, views[index]) for views in contrast])
        for index, name in enumerate(PERP_NEG_PROMPTS)
    }
    return conditionings.updated(**others)


def grey_backgrounds(levels: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    """One grey level a view, uniform between two, as RGB (count, 3)."""
    low, high = levels
    return (low + (high - low) * torch.rand(count, 1, generator=generator)).expand(count, 3)


def camera_views(cameras: Cameras) -> list[str]:
    """The view word of each camera."""
    angles = zip(cameras.azimuth.tolist(), cameras.elevation.tolist(), strict=True)
    return [view_of(azimuth, elevation) for azimuth, elevation in angles]


def camera_prompts(options: SharedOptions, cameras: Cameras) -> list[str]:
    """The prompt of each camera, with its view word where they are enabled."""
    if not options.view_words:
        return [options.prompt] * len(cameras)
    return [view_prompt(options.prompt, view) for view in camera_views(cameras)]
