"""A score-based loss as data: where the noise comes from, the law of t, the weight, and the list of terms (a YAML file)."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from distill.runtime.errors import UserError

Weight = Literal["sigma_squared", "one", "sigma", "alpha_sigma_squared", "sigma_over_alpha"]
EvalPoint = Literal["now", "earlier", "reference"]


@dataclass(frozen=True)
class LinearSchedule:
    """A number that goes linearly from `start` to `end` over the shares [begin, until] of a run."""

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.until <= 1:
            raise UserError(
                f"a ramp goes from {self.begin} until {self.until}: expected 0 <= begin < until <= 1"
            )

    def at(self, progress: float) -> float:
        """The number at a share of the run in [0, 1]."""
        share = min(max((progress - self.begin) / (self.until - self.begin), 0.0), 1.0)
        return self.start + (self.end - self.start) * share


def number(value: float | LinearSchedule, progress: float) -> float:
    """A number that may be a ramp, at a share of the run."""
    return value.at(progress) if isinstance(value, LinearSchedule) else value


@dataclass(frozen=True)
class Term:
    """coefficient * a prediction of eps.

    `teacher` answers for `prompt`, guided by `guidance` away from `negative_prompt`: eps_0 + s (eps_c - eps_0); `critic` for `prompt`;
    `noise` is the noise that made x_t (with inversion, the noise that its path implies).
    """

    predict: Literal["noise", "teacher", "critic"]
    coefficient: float | LinearSchedule = 1.0
    prompt: str = (
        "conditional"  # or unconditional, negative, reference, or one of the objective's own `prompts`
    )
    guidance: float | LinearSchedule = 1.0
    negative_prompt: str = "unconditional"
    at: EvalPoint = "now"  # x_t; or the earlier point of an inversion path; or the reference's x_t (DDS)
    times: tuple[float, float] = (0.0, 1.0)  # counts where t / T is within them, the first included
    rescale: float = 0.0  # share of CFG rescale on x0 (Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16)
    perp_neg: float = 0.0  # weight of the other views' perpendicular parts (Perp-Neg, Armandpour et al. 2023, arXiv:2304.04968)
    contrast: float = 0.0  # weight of what sets the prompt apart from the other views': eps_c minus their mean, beside the guidance

    def __post_init__(self) -> None:
        if self.predict != "teacher" and (self.guidance, self.rescale, self.perp_neg, self.contrast) != (
            1.0,
            0.0,
            0.0,
            0.0,
        ):
            raise UserError(
                f"a term of the {self.predict} takes no guidance, rescale, perp_neg or contrast: they belong to the teacher's"
            )
        if self.at != "now" and self.predict == "noise":
            raise UserError(f"the noise has no value at {self.at!r}: a term of the noise is at now")

    @property
    def guided(self) -> bool:
        """Whether the term needs two predictions; guidance 1 does not."""
        return self.guidance != 1.0

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts whose predictions the term is made of."""
        if self.predict == "noise":
            return ()
        names = (self.negative_prompt, self.prompt) if self.guided else (self.prompt,)
        return (*names, *OTHER_VIEWS) if self.perp_neg or self.contrast else names


OTHER_VIEWS = ("other_view_0", "other_view_1")  # what Perp-Neg turns from; a driver with views gives them


@dataclass(frozen=True)
class TimestepSampler:
    """t / T is uniform in [low, high], where high goes from high[0] to high[1] over the share `until` of a run.

    `anneal`: linear, or sqrt (HiFA, arXiv:2305.18766, section 3.3), or none (high[0] throughout). `shared_timestep` draws one t a
    batch instead of one a sample; `deterministic` takes the upper end itself.
    """

    low: float = 0.02
    high: tuple[float, float] = (0.98, 0.98)
    anneal: Literal["none", "linear", "sqrt"] = "linear"
    until: float = 1.0
    shared_timestep: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.low <= min(self.high) and max(self.high) <= 1 and 0 < self.until <= 1):
            said = f"times from {self.low} to {list(self.high)} until {self.until}"
            raise UserError(f"{said}: expected 0 <= low <= high <= 1 and 0 < until <= 1")

    def upper(self, progress: float) -> float:
        """The upper end at a share of the run in [0, 1]."""
        share = min(progress / self.until, 1.0)
        share = {"none": 0.0, "linear": share, "sqrt": math.sqrt(share)}[self.anneal]
        return self.high[0] + (self.high[1] - self.high[0]) * share

    def draw(self, count: int, steps: int, progress: float, generator: torch.Generator) -> Tensor:
        """Integer times (count,) on the CPU."""
        share = (
            torch.ones(1)
            if self.deterministic
            else torch.rand(1 if self.shared_timestep else count, generator=generator)
        )
        return (
            ((self.low + (self.upper(progress) - self.low) * share.expand(count)) * (steps - 1))
            .round()
            .long()
        )


@dataclass(frozen=True)
class NoiseSource:
    """Where x_t comes from: fresh noise, the same noise at every step, or DDIM inversion of the latents (its reverse ODE).

    An inversion path has `steps` steps from clean to t, guided by `guidance` (0: the empty prompt alone, 1: the prompt alone);
    with a `gap` it goes in them to t - gap T, the earlier point, and from there to t in one more.
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
        """Whether the path has an earlier point."""
        return self.kind == "inversion" and self.gap != 0.0


@dataclass(frozen=True)
class CriticOptions:
    """A model of what is being made, trained along with it (VSD, Wang et al. 2023, arXiv:2305.16213, section 3.2).

    `lora` shares the teacher's frozen weights; `copy` trains all of a copy. With `camera` it is told the view as one more text
    token, and forgets it for a share `dropout` of its training.
    """

    kind: Literal["lora", "copy"] = "lora"
    rank: int = 8
    learning_rate: float = 1e-3
    updates: int = 1  # a step
    camera: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1 or self.updates < 1 or self.learning_rate <= 0 or not 0 <= self.dropout <= 1:
            raise UserError(
                "a critic's rank and updates must be at least 1, its learning rate positive and dropout within [0, 1]"
            )


@dataclass(frozen=True)
class LossComponent:
    """w(t) * sum of terms at times and noise of its own; `normalise` divides each sample by mean |z - x0| of the first teacher term."""

    terms: tuple[Term, ...]
    weight: Weight = "sigma_squared"
    time: TimestepSampler = TimestepSampler()
    noise: NoiseSource = NoiseSource()
    normalise: bool = False  # DMD (Yin et al. 2024, arXiv:2311.18828), eq. 8

    def __post_init__(self) -> None:
        if not self.terms:
            raise UserError("an objective needs at least one term")
        if any(term.at == "earlier" for term in self.terms) and not self.noise.has_gap:
            raise UserError(
                "a term at earlier needs a path to be earlier on: give noise.kind=inversion and a noise.gap"
            )
        if self.needs_teacher:
            _ = self.teacher

    @property
    def needs_teacher(self) -> bool:
        """Whether the first teacher term's prediction is used apart from its share in the sum."""
        return self.normalise

    def active(self, progress: float) -> tuple[Term, ...]:
        """The terms whose coefficient is not 0 at a share of the run: what the others would need is not evaluated."""
        return tuple(term for term in self.terms if number(term.coefficient, progress) != 0)

    def asked(self, of: Literal["teacher", "critic"], progress: float) -> tuple[tuple[EvalPoint, str], ...]:
        """What must be predicted: each place and prompt once."""
        terms = [term for term in self.active(progress) if term.predict == of]
        if self.needs_teacher and of == "teacher":
            terms.append(self.teacher)
        return tuple(dict.fromkeys((term.at, name) for term in terms for name in term.prompts))

    @property
    def teacher(self) -> Term:
        """The first term of the teacher. Raises `UserError` where there is none."""
        for term in self.terms:
            if term.predict == "teacher":
                return term
        raise UserError("the objective has no term of the teacher, which normalise and image need")

    def reused(self) -> frozenset[tuple[EvalPoint, str]]:
        """What an inversion path has predicted already on its way through the earlier point."""
        if not self.noise.has_gap or self.noise.guidance not in (0.0, 1.0):
            return frozenset()
        return frozenset({("earlier", "unconditional" if self.noise.guidance == 0 else "conditional")})

    @property
    def path_prompts(self) -> tuple[str, ...]:
        """The prompts that an inversion step asks for."""
        if self.noise.kind != "inversion":
            return ()
        return {0.0: ("unconditional",), 1.0: ("conditional",)}.get(
            self.noise.guidance, ("unconditional", "conditional")
        )

    def nfe(self, progress: float) -> int:
        """Forward passes of the teacher and critic a sample, in units of one U-Net call (F)."""
        path = len(self.path_prompts) * (self.noise.steps + self.noise.has_gap)
        return (
            path
            + len(set(self.asked("teacher", progress)) - self.reused())
            + len(self.asked("critic", progress))
        )


@dataclass(frozen=True)
class ObjectiveOptions(LossComponent):
    """A loss: one part, or two that add up (decoupled laws of t).

    `clamp` bounds each element of g, then `clip` the root mean square of each sample's; 0 is off.

    `prompts` are further prompts the terms may name, made from the sample's own: {low_quality: "{prompt}, blurry"}.
    `image` weighs the same residual in pixels, through the decoder (HiFA, arXiv:2305.18766, eq. 9), at a guidance scale of
    its own where `image_guidance` gives one: what shapes best colours too strongly.
    """

    clip: float = 0.0
    clamp: float = 0.0
    image: float = 0.0
    image_guidance: float | LinearSchedule | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    critic: CriticOptions | None = None
    second: LossComponent | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image < 0:
            raise UserError(f"image is {self.image}: a weight of at least 0 is expected")
        if self.image_guidance is not None and not (self.image and self.teacher.guided):
            raise UserError(
                "image_guidance needs a weight image and a guided first term of the teacher, whose two predictions it mixes"
            )

    @property
    def needs_teacher(self) -> bool:
        """As of the part, and for the residual in pixels."""
        return self.normalise or self.image > 0

    @property
    def parts(self) -> tuple[LossComponent, ...]:
        """The parts that add up."""
        return (self,) if self.second is None else (self, self.second)

    def cost(self, progress: float = 0.0) -> int:
        """U-Net work a sample and step in F, one forward pass: predictions, inversion paths, and 3F an update of the critic."""
        updates = 0 if self.critic is None else 3 * self.critic.updates
        return sum(part.nfe(progress) for part in self.parts) + updates

    def total_cost(self, steps: int) -> int:
        """Of a whole run, a sample, in F."""
        return sum(self.cost(step / steps) for step in range(steps))

    @property
    def names(self) -> tuple[str, ...]:
        """Every prompt that is ever asked for."""
        asked = [name for part in self.parts for term in part.terms for name in term.prompts]
        return tuple(dict.fromkeys([*asked, *(name for part in self.parts for name in part.path_prompts)]))

    @property
    def needs_critic(self) -> bool:
        """Whether a term is the critic's."""
        return any(term.predict == "critic" for part in self.parts for term in part.terms)

    @property
    def needs_reference(self) -> bool:
        """Whether a term looks at a reference (DDS)."""
        return any(term.at == "reference" for part in self.parts for term in part.terms)
