"""The optimisation: cameras -> renders -> latents -> objective -> step (DreamFusion, arXiv:2209.14988, algorithm 1)."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.core.sampling import Img2ImgInit, sample_ode
from distill.core.score import Guided
from distill.data.images import BACKGROUND
from distill.objectives.algebra import (
    DistillationOutput,
    PromptConditionings,
    ScoreDistillation,
    text_conditions,
)
from distill.objectives.critic import Critic
from distill.objectives.diagnostics import DiagnosticOptions, look
from distill.objectives.options import OTHER_VIEWS, ObjectiveOptions
from distill.runtime.errors import UserError
from distill.runtime.run import Run
from distill.teacher.latent import Teacher
from distill.teacher.linear import fit_linear_encoder
from distill.teacher.vocabulary import check_prompt
from sds3d.scene.cameras import CameraOptions, Cameras, ring, sample_cameras
from sds3d.scene.nerf import RenderedViews, Scene, SceneOptions
from sds3d.scene.regularizers import RegularizerOptions, regularization
from sds3d.text_to_3d.mesh_control import MeshControl
from sds3d.text_to_3d.prompts import other_views, view_of, view_prompt
from sds3d.text_to_3d.stages.orientation import (
    AZIMUTH_VIEWS,
    OrientationCheck,
    OrientationOptions,
    quarter_turns,
    view_errors,
)
from sds3d.text_to_3d.stages.sdedit_refinement import CHUNK, RefinedViews, SDEditRefinementOptions


@dataclass(frozen=True)
class TextTo3dOptions:
    """How a scene is driven by a prompt."""

    prompt: str
    negative_prompt: str = ""
    views: int = 4
    view_words: bool = True
    camera: CameraOptions = field(default_factory=lambda: CameraOptions(elevation=(-10.0, 70.0)))
    background: tuple[float, float] = (
        BACKGROUND  # grey levels behind the object, one a view: what the teacher knows
    )
    coarse_resolution: int = 32  # renders of the warm-up, enlarged for the teacher
    coarse_until: float = 0.3
    coarse_latents: Literal["vae", "linear"] = (
        "vae"  # linear: the warm-up leaves the encoder out (distill/teacher/linear.py)
    )
    pixel_loss_target: Literal["albedo", "scene"] = (
        "albedo"  # by a residual in pixels; albedo: the latents' then shapes and does not colour
    )
    learning_rate: float = 0.01
    mlp_learning_rate: float = 0.002
    final_rate: float = 0.1  # share of the learning rates left at the end, falling as a cosine: late gradients are mostly noise
    adam_epsilon: float = 1e-15  # larger ones hold still what gets next to no gradient, such as empty space
    regularizers: RegularizerOptions = field(default_factory=RegularizerOptions)
    facing: OrientationOptions = OrientationOptions()
    redraw: SDEditRefinementOptions = SDEditRefinementOptions()
    diagnostics: DiagnosticOptions = DiagnosticOptions()

    def __post_init__(self) -> None:
        if self.views < 1:
            raise UserError(f"views is {self.views}: at least 1 is needed")
        replace(self.camera, elevation=self.redraw.elevation)  # raises for a range that no camera can have
        last = max((ask.at for ask in self.facing.asks), default=0.0)
        if self.redraw.strengths and last >= self.redraw.begin:
            raise UserError(
                f"facing is asked at {last:g}: what is redrawn, from {self.redraw.begin:g} of the run on, must not turn"
            )
        if (
            not 0 <= self.final_rate <= 1
            or min(self.learning_rate, self.mlp_learning_rate, self.adam_epsilon) <= 0
        ):
            raise UserError(
                "final_rate must be a share in [0, 1], learning rates and adam_epsilon must be positive"
            )
        if not 0 <= self.coarse_until <= 1:
            raise UserError(f"coarse_until is {self.coarse_until}: a share of the run in [0, 1] is expected")
        if not 0 <= self.background[0] <= self.background[1] <= 1:
            raise UserError(
                f"background is {list(self.background)}: two grey levels in [0, 1], low then high, are expected"
            )


def check_inputs(teacher: Teacher, options: TextTo3dOptions) -> None:
    """Raises `UserError` for a prompt that is empty or that the teacher does not know."""
    check_prompt(options.prompt, teacher.words)
    if options.negative_prompt:
        check_prompt(options.negative_prompt, teacher.words)


def view_prompts(options: TextTo3dOptions, cameras: Cameras) -> list[str]:
    """The prompt of each camera, with its view word where they are switched on."""
    views = [
        view_of(*place) for place in zip(cameras.azimuth.tolist(), cameras.elevation.tolist(), strict=True)
    ]
    return [view_prompt(options.prompt, view) if options.view_words else options.prompt for view in views]


def conditions_for(
    teacher: Teacher, options: TextTo3dOptions, objective: ObjectiveOptions, cameras: Cameras
) -> PromptConditionings:
    """The text states the objective asks for: of each camera's prompt, with its view word where they are switched on."""
    conditions = text_conditions(
        teacher.encode_text, view_prompts(options, cameras), objective, options.negative_prompt
    )
    if OTHER_VIEWS[0] not in objective.names:
        return conditions
    views = [
        view_of(*place) for place in zip(cameras.azimuth.tolist(), cameras.elevation.tolist(), strict=True)
    ]
    others = [
        [view_prompt(options.prompt, other_views(view)[i]) for view in views] for i in range(len(OTHER_VIEWS))
    ]
    turned = {name: teacher.encode_text(texts) for name, texts in zip(OTHER_VIEWS, others, strict=True)}
    return PromptConditionings({**conditions.states, **turned})


def grey_backgrounds(options: TextTo3dOptions, count: int, generator: torch.Generator) -> Tensor:
    """One grey a view, (count, 3)."""
    low, high = options.background
    return (low + (high - low) * torch.rand(count, 1, generator=generator)).expand(count, 3)


class TextTo3d:
    """A scene, its teacher and its objective; `train` runs the optimisation inside a `Run`."""

    def __init__(
        self,
        run: Run,
        teacher: Teacher,
        scene: SceneOptions,
        objective: ObjectiveOptions,
        options: TextTo3dOptions,
        control: MeshControl | None = None,
    ) -> None:
        """control: a coarse mesh whose shape is kept, through whose adapter the teacher is seen."""
        self.run, self.teacher, self.options, self.control = run, teacher, options, control
        self.scene = Scene(scene, run.device)
        self.critic = Critic(teacher, objective.critic) if objective.critic is not None else None
        self.seen = teacher if control is None else control.teacher
        self.objective = ScoreDistillation(self.seen, objective, self.critic, teacher.decode)
        self.redrawn = RefinedViews(options.redraw.views, teacher.resolution).to(run.device)
        self.linear = fit_linear_encoder(teacher) if options.coarse_latents == "linear" else None
        encoding = list(self.scene.field.encoding.parameters())
        known = {id(parameter) for parameter in encoding}
        rest = [parameter for parameter in self.scene.parameters() if id(parameter) not in known]
        self.rates = (options.learning_rate, options.mlp_learning_rate)
        groups = [
            {"params": part, "lr": rate} for part, rate in zip((encoding, rest), self.rates, strict=True)
        ]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=options.adam_epsilon)

    def train(self) -> Scene:
        """Optimise to the end of the run, previews on the way; returns the scene."""
        run, options = self.run, self.options
        run.track(scene=self.scene, optimizer=self.optimizer)
        if self.critic is not None:
            run.track(critic=self.critic)
        turning, rounds = self.turning_points, options.redraw.rounds(run.options.steps)
        if rounds:
            run.track(redrawn=self.redrawn)
        for step in run.steps():
            if step in turning:
                run.log(turned=self.face(turning[step], step))
            if step in rounds:
                self.redraw(rounds[step])
            if step >= self.distilled:
                views = self.fit(step)
            else:
                outcome, views = self.step(step / self.distilled, step)
                look(run, self.objective, outcome, options.diagnostics)
                run.log(g=outcome.gradient.square().mean().sqrt())
            run.log(opacity=views.opacity.detach().mean())
            if run.due(run.options.preview_every):
                shown = self.scene.render(
                    ring(4, resolution=self.teacher.resolution), torch.full((4, 3), 0.85)
                )
                run.preview("views", shown.rgb)
        return self.scene

    @property
    def turning_points(self) -> dict[int, OrientationCheck]:
        """By the steps at which it is asked which way the scene faces: by the view words, which a mesh in control knows better."""
        asked = self.options.view_words and self.control is None
        steps = self.run.options.steps
        return {
            at: ask for ask in self.options.facing.asks if asked and (at := round(ask.at * steps)) < steps
        }

    @property
    def distilled(self) -> int:
        """Steps that the objective drives, its own schedules ending with them; the rest of the run is fitted to redrawn views."""
        steps = self.run.options.steps
        return min(self.options.redraw.rounds(steps), default=steps)

    @property
    def nfe(self) -> int:
        """U-Net work of the whole run in forward passes of one sample."""
        steps = self.options.views * self.objective.options.total_cost(self.distilled)
        asked = sum(self.options.facing.cost(ask) for ask in self.turning_points.values())
        return steps + asked + self.options.redraw.cost(self.run.options.steps)

    def face(self, ask: OrientationCheck, step: int) -> float:
        """Turn the scene to where the view words fit it best; by how many degrees."""
        options, teacher, generator = (
            self.options.facing,
            self.teacher,
            torch.Generator().manual_seed(self.run.options.seed + step),
        )
        cameras = ring(options.views, options.elevation, teacher.resolution)
        latents = teacher.encode_images(
            self.scene.render(cameras, grey_backgrounds(self.options, options.views, generator)).rgb
        )
        states = teacher.encode_text([view_prompt(self.options.prompt, word) for word in AZIMUTH_VIEWS])
        quarters = quarter_turns(
            view_errors(teacher, latents, states, ask.draws, generator).cpu(), cameras, ask.margin
        )
        self.scene.turn_by(quarters)
        return 90.0 * quarters

    def redraw(self, strength: float) -> None:
        """Draw the scene's views over, from new cameras, each by the prompt of its view."""
        options, run, teacher = self.options, self.run, self.teacher
        seen = replace(options.camera, elevation=options.redraw.elevation, resolution=teacher.resolution)
        cameras = sample_cameras(seen, options.redraw.views, run.generator)
        behind = grey_backgrounds(options, options.redraw.views, run.generator)
        shown = self.scene.render(cameras.to(run.device), behind.to(run.device)).rgb
        clean = torch.cat([teacher.encode_images(part) for part in shown.split(CHUNK)])
        noise = torch.randn(clean.shape, generator=run.generator).to(clean)
        guided = Guided(self.seen, teacher.encode_text([options.negative_prompt]), options.redraw.guidance)
        drawn = []
        for at in torch.arange(len(shown)).split(CHUNK):
            if self.control is not None:
                self.control.look(cameras.some(at))
            states = teacher.encode_text(view_prompts(options, cameras.some(at)))
            begun = Img2ImgInit(clean[at], strength)
            drawn.append(
                teacher.decode(
                    sample_ode(
                        guided, teacher.scheduler, states, noise[at], options.redraw.steps, picture=begun
                    )
                )
            )
        self.redrawn.take(cameras, behind, torch.cat(drawn).clamp(0, 1))
        run.preview("redrawn", self.redrawn.images)

    def fit(self, step: int) -> RenderedViews:
        """One update towards what was redrawn."""
        options, generator = self.options.redraw, self.run.generator
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = options.learning_rate * rate / self.rates[0]
        self.scene.update(step, generator)
        cameras, behind, images = self.redrawn.some(self.options.views, generator)
        views = self.scene.render(cameras, behind, generator, training=True)
        off = (views.rgb - images).square().mean()
        weights = replace(self.options.regularizers, opacity=options.opacity)
        self.descend(options.weight * off + regularization(self.scene, views, weights, 1.0, generator))
        self.run.log(off=off.detach())
        return views

    def descend(self, loss: Tensor) -> None:
        """One step of the optimiser."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def encode(self, images: Tensor, coarse: bool) -> Tensor:
        """Latents of renders (B, 3, H, W); coarse ones are enlarged for the VAE, or go through the linear encoder."""
        if coarse and self.linear is not None:
            return self.linear(images)
        size = (self.teacher.resolution,) * 2
        return self.teacher.encode_images(
            F.interpolate(images, size=size, mode="bilinear", align_corners=False) if coarse else images
        )

    def step(self, progress: float, step: int) -> tuple[DistillationOutput, RenderedViews]:
        """One update at a share of the run in [0, 1)."""
        options, generator = self.options, self.run.generator
        left = options.final_rate + (1 - options.final_rate) * (1 + math.cos(math.pi * progress)) / 2
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * left
        self.scene.update(step, generator)
        cameras = sample_cameras(options.camera, options.views, generator)
        coarse = progress < options.coarse_until
        drawn = cameras.at(options.coarse_resolution if coarse else self.teacher.resolution).to(
            self.run.device
        )
        behind = grey_backgrounds(options, options.views, generator).to(self.run.device)
        views = self.scene.render(drawn, behind, generator, training=True)
        parts = options.pixel_loss_target == "albedo" and self.objective.options.image and not coarse
        shaped, painted = views.split_gradients() if parts else (views.rgb, views.rgb)
        latents = self.encode(shaped, coarse)
        if self.control is not None:
            self.control.look(cameras.at(self.teacher.resolution))
        conditions = conditions_for(self.teacher, options, self.objective.options, cameras)
        poses = drawn.poses()
        if self.critic is not None:
            text = conditions.states["conditional"]
            conditions = PromptConditionings({**conditions.states, "critic": self.critic.states(text, poses)})
        outcome = self.objective(latents, conditions, progress, generator, images=None if coarse else painted)
        self.descend(
            outcome.loss + regularization(self.scene, views, options.regularizers, progress, generator)
        )
        if self.critic is not None:
            self.critic.train_on(latents, conditions.states["conditional"], poses, generator)
        return outcome, views
