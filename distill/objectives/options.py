"""A first-order score-based loss as data: noise source, timestep sampler, weight and a list of terms (a YAML
file).
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from distill.runtime.errors import UserError

Weight = Literal["sigma_squared", "one", "sigma", "alpha_sigma_squared", "sigma_over_alpha"]
EvalPoint = Literal["now", "earlier", "reference"]
Query = tuple[EvalPoint, str]  # where a model is evaluated, under which prompt

# The prompts that Perp-Neg and `contrast` repel; the caller that knows the views supplies them.
PERP_NEG_PROMPTS = ("perp_neg_0", "perp_neg_1")


@dataclass(frozen=True)
class LinearSchedule:
    """A scalar that goes linearly from `start` to `end` over the fractions [begin, until] of a run."""

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.until <= 1:
            raise UserError(
                f"a schedule goes from {self.begin} until {self.until}: expected 0 <= begin < until <= 1"
            )

    def value(self, progress: float) -> float:
        """The scalar at a fraction of the run in [0, 1]."""
        fraction = min(max((progress - self.begin) / (self.until - self.begin), 0.0), 1.0)
        return self.start + (self.end - self.start) * fraction


def resolve(value: float | LinearSchedule, progress: float) -> float:
    """A scalar that may be a schedule, at a fraction of the run."""
    return value.value(progress) if isinstance(value, LinearSchedule) else value


@dataclass(frozen=True)
class Term:
    """coefficient * a prediction of eps.

    `teacher` predicts under `prompt`, guided away from `negative_prompt`: eps_0 + s (eps_c - eps_0); `critic`
    predicts under `prompt`; `noise` is the noise in x_t (with inversion, the noise that the trajectory
    implies).
    """

    predict: Literal["noise", "teacher", "critic"]
    coefficient: float | LinearSchedule = 1.0
    prompt: str = "conditional"  # or unconditional, negative, reference, or one of the objective's `prompts`
    guidance: float | LinearSchedule = 1.0  # the CFG scale s
    negative_prompt: str = "unconditional"
    # x_t; or the earlier point of an inversion trajectory; or the reference's x_t (DDS)
    eval_point: EvalPoint = "now"
    t_range: tuple[float, float] = (0.0, 1.0)  # the term counts where t / T is inside, the first included
    rescale: float = 0.0  # fraction of CFG rescale on x0 (Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16)
    perp_neg: float = 0.0  # weight of Perp-Neg's perpendicular parts (arXiv:2304.04968)
    contrast: float = 0.0  # weight of eps_c minus the mean of the repelled prompts', beside the guidance

    def __post_init__(self) -> None:
        guidance = (self.guidance, self.rescale, self.perp_neg, self.contrast)
        if self.predict != "teacher" and guidance != (1.0, 0.0, 0.0, 0.0):
            raise UserError(
                f"a term of the {self.predict} takes no guidance, rescale, perp_neg or contrast: "
                "they belong to the teacher's"
            )
        if self.eval_point != "now" and self.predict == "noise":
            raise UserError(
                f"the noise has no value at {self.eval_point!r}: give a noise term eval_point=now"
            )

    @property
    def guided(self) -> bool:
        """Whether the term needs two predictions; guidance 1 does not."""
        return self.guidance != 1.0

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The prompts whose predictions the term is made of."""
        if self.predict == "noise":
            return ()
        names = (self.negative_prompt, self.prompt) if self.guided else (self.prompt,)
        return (*names, *PERP_NEG_PROMPTS) if self.perp_neg or self.contrast else names


@dataclass(frozen=True)
class TimestepSampler:
    """t / T is uniform in [low, high]; high moves from high[0] to high[1] over the fraction `until` of a run.

    `anneal`: linear, or sqrt (HiFA, arXiv:2305.18766, section 3.3), or none (high[0] throughout).
    `shared_timestep` draws one t a batch instead of one a sample; `deterministic` takes the upper end itself.
    """

    low: float = 0.02
    high: tuple[float, float] = (0.98, 0.98)
    anneal: Literal["none", "linear", "sqrt"] = "linear"
    until: float = 1.0
    shared_timestep: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.low <= min(self.high) and max(self.high) <= 1 and 0 < self.until <= 1):
            raise UserError(
                f"times from {self.low} to {list(self.high)} until {self.until}: "
                "expected 0 <= low <= high <= 1 and 0 < until <= 1"
            )

    def upper(self, progress: float) -> float:
        """The upper end at a fraction of the run in [0, 1]."""
        fraction = min(progress / self.until, 1.0)
        fraction = {"none": 0.0, "linear": fraction, "sqrt": math.sqrt(fraction)}[self.anneal]
        return self.high[0] + (self.high[1] - self.high[0]) * fraction

    def sample(
        self, count: int, num_train_timesteps: int, progress: float, generator: torch.Generator
    ) -> Tensor:
        """Integer times (count,) on the CPU."""
        size = 1 if self.shared_timestep else count
        uniform = torch.ones(1) if self.deterministic else torch.rand(size, generator=generator)
        fraction = self.low + (self.upper(progress) - self.low) * uniform.expand(count)
        return (fraction * (num_train_timesteps - 1)).round().long()


@dataclass(frozen=True)
class NoiseSource:
    """Where x_t comes from: fresh noise, the same noise at every step, or DDIM inversion of the latents.

    An inversion trajectory has `steps` steps from clean to t, guided by `guidance` (0: the empty prompt
    alone, 1: the prompt alone). With a `gap` these end at t - gap T, the earlier point, and one more step
    reaches t.
    """

    kind: Literal["fresh", "fixed", "inversion"] = "fresh"
    seed: int = 0  # of the fixed noise
    steps: int = 10
    guidance: float = 0.0
    gap: float | LinearSchedule = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"an inversion of {self.steps} steps: at least 1 is needed")

    @property
    def has_gap(self) -> bool:
        """Whether the trajectory has an earlier point."""
        return self.kind == "inversion" and self.gap != 0.0


@dataclass(frozen=True)
class CriticOptions:
    """A denoiser trained on the generator's outputs along with it (VSD, arXiv:2305.16213, section 3.2).

    `lora` shares the teacher's frozen weights; `copy` trains all of a copy. With `camera` the conditioning's
    camera is one more text token, zeroed for a fraction `camera_dropout` of its training.
    """

    kind: Literal["lora", "copy"] = "lora"
    rank: int = 8  # of the LoRA
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    max_norm: float | None = None  # to which the gradient is clipped; null: as it is
    updates: int = 1  # a step
    camera: bool = False
    camera_dropout: float = 0.1

    def __post_init__(self) -> None:
        positive = self.learning_rate > 0 and (self.max_norm is None or self.max_norm > 0)
        fractions = 0 <= self.camera_dropout <= 1 and 0 <= min(self.betas) <= max(self.betas) < 1
        if self.rank < 1 or self.updates < 1 or not positive or not fractions:
            raise UserError(
                "a critic needs rank and updates of at least 1, a positive learning_rate and max_norm, "
                "betas within [0, 1) and camera_dropout within [0, 1]"
            )


@dataclass(frozen=True)
class LossComponent:
    """w(t) * a sum of terms, at times and noise of its own.

    `normalise` divides each sample by mean |z - x0| of the first teacher term (DMD, arXiv:2311.18828, eq. 8).
    """

    terms: tuple[Term, ...]
    weight: Weight = "sigma_squared"
    time: TimestepSampler = TimestepSampler()
    noise: NoiseSource = NoiseSource()
    normalise: bool = False

    def __post_init__(self) -> None:
        if not self.terms:
            raise UserError("an objective needs at least one term")
        if any(term.eval_point == "earlier" for term in self.terms) and not self.noise.has_gap:
            raise UserError(
                "a term at the earlier point needs a trajectory that has one: "
                "give noise.kind=inversion and a noise.gap"
            )
        if self.needs_teacher:
            _ = self.teacher

    @property
    def needs_teacher(self) -> bool:
        """Whether the first teacher term's prediction is used apart from its term."""
        return self.normalise

    @property
    def teacher(self) -> Term:
        """The first term of the teacher. Raises `UserError` where there is none."""
        for term in self.terms:
            if term.predict == "teacher":
                return term
        raise UserError("the objective has no term of the teacher, which normalise and image need")

    def active(self, progress: float) -> tuple[Term, ...]:
        """The terms with a coefficient other than 0 at a fraction of the run; the others are not
        evaluated.
        """
        return tuple(term for term in self.terms if resolve(term.coefficient, progress) != 0)

    def queries(self, model: Literal["teacher", "critic"], progress: float) -> tuple[Query, ...]:
        """What a model must predict: each evaluation point and prompt once."""
        terms = [term for term in self.active(progress) if term.predict == model]
        if self.needs_teacher and model == "teacher":
            terms.append(self.teacher)
        return tuple(dict.fromkeys((term.eval_point, name) for term in terms for name in term.prompt_names))

    def reused_queries(self) -> frozenset[Query]:
        """What an inversion trajectory has predicted already at its earlier point."""
        if not self.noise.has_gap or self.noise.guidance not in (0.0, 1.0):
            return frozenset()
        return frozenset({("earlier", "unconditional" if self.noise.guidance == 0 else "conditional")})

    @property
    def trajectory_prompts(self) -> tuple[str, ...]:
        """The prompts that an inversion step evaluates."""
        if self.noise.kind != "inversion":
            return ()
        single = {0.0: ("unconditional",), 1.0: ("conditional",)}
        return single.get(self.noise.guidance, ("unconditional", "conditional"))

    def nfe(self, progress: float) -> int:
        """Function evaluations of teacher and critic a sample and step."""
        trajectory = len(self.trajectory_prompts) * (self.noise.steps + self.noise.has_gap)
        teacher = len(set(self.queries("teacher", progress)) - self.reused_queries())
        return trajectory + teacher + len(self.queries("critic", progress))


@dataclass(frozen=True)
class ObjectiveOptions(LossComponent):
    """A loss: one component, or two that add up (decoupled timestep samplers).

    `clamp` bounds each element of g, then `clip` the root mean square of each sample's; 0 disables them.
    `prompts` are further prompts for the terms, made from the sample's own: {low_quality: "{prompt},
    blurry"}. `image` weighs the same residual in pixels, through the decoder (HiFA, arXiv:2305.18766, eq. 9),
    at a CFG scale of its own where `image_guidance` gives one: the scale that shapes best oversaturates
    colours. `jacobian` differentiates w / 2 |sum of terms|^2 through the network, as in the denoising loss
    L_diff (DreamFusion, arXiv:2209.14988, eq. 2), of which score distillation leaves the Jacobian out.
    """

    clip: float = 0.0
    clamp: float = 0.0
    image: float = 0.0
    image_guidance: float | LinearSchedule | None = None
    jacobian: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    critic: CriticOptions | None = None
    second: LossComponent | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image < 0:
            raise UserError(f"image is {self.image}: a weight of at least 0 is expected")
        if self.image_guidance is not None and not (self.image and self.teacher.guided):
            raise UserError(
                "image_guidance needs a weight image and a guided first term of the teacher, "
                "whose two predictions it mixes"
            )

        simple = self.second is None and self.noise.kind != "inversion" and not self.normalise
        if self.jacobian and (not simple or self.image or self.needs_critic):
            raise UserError(
                "jacobian is of a loss of the teacher alone: leave second, critic, image, normalise and "
                "noise.kind=inversion out"
            )

    @property
    def needs_teacher(self) -> bool:
        """As of the component, and for the residual in pixels."""
        return self.normalise or self.image > 0

    @property
    def components(self) -> tuple[LossComponent, ...]:
        """The components that add up."""
        return (self,) if self.second is None else (self, self.second)

    def cost(self, progress: float = 0.0) -> int:
        """U-Net work a sample and step in F, one forward pass: NFE, and 3 F an update of the critic.

        A backward pass to the input alone, of `jacobian`, counts as much as the forward pass.
        """
        updates = 0 if self.critic is None else 3 * self.critic.updates
        passes = 2 if self.jacobian else 1
        return passes * sum(component.nfe(progress) for component in self.components) + updates

    def total_cost(self, steps: int) -> int:
        """Of a whole run, a sample, in F."""
        return sum(self.cost(step / steps) for step in range(steps))

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """Every prompt that is ever evaluated."""
        terms = [
            name for component in self.components for term in component.terms for name in term.prompt_names
        ]
        trajectories = [name for component in self.components for name in component.trajectory_prompts]
        return tuple(dict.fromkeys([*terms, *trajectories]))

    @property
    def needs_critic(self) -> bool:
        """Whether a term is the critic's."""
        return any(term.predict == "critic" for component in self.components for term in component.terms)

    @property
    def needs_reference(self) -> bool:
        """Whether a term is evaluated at a reference (DDS)."""
        return any(
            term.eval_point == "reference" for component in self.components for term in component.terms
        )
