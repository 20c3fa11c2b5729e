"""One algebra of first-order score distillation: g = w(t) * sum_i c_i eps_i(x; prompt_i), evaluated from data (`ObjectiveOptions`).

The loss handed to autograd is 1/2 |z - stopgrad(z - g)|^2, summed over a sample's elements and averaged over the batch,
so that its gradient on each sample's latent is g / batch: image-space weights then mean the same at every resolution.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distill.core.score import NFECounter, Prediction, ScoreModel
from distill.objectives.inversion import invert
from distill.objectives.options import (
    OTHER_VIEWS,
    EvalPoint,
    LossComponent,
    ObjectiveOptions,
    Term,
    Weight,
    number,
)
from distill.runtime.errors import UserError

Predictions = dict[tuple[EvalPoint, str], Prediction]


@dataclass(frozen=True)
class PromptConditionings:
    """Text states by prompt name: (B, L, D), or (1, L, D) where all samples share one."""

    states: Mapping[str, Tensor]

    def select(self, name: str, count: int) -> Tensor:
        """The states of one prompt, one a sample. Raises `UserError` where a term needs a prompt that is not given."""
        if name not in self.states:
            given = {"negative": "give negative_prompt", "reference": "give the reference's prompt"}
            fix = given.get(
                name, f"add it to the objective's prompts, or use one of {', '.join(self.states)}"
            )
            raise UserError(f"the objective has a term with the prompt {name!r}: {fix}")
        return self.states[name].expand(count, *self.states[name].shape[1:])


@dataclass(frozen=True)
class NoisyDraw:
    """A part's draw: times (B,), the noise, and x at each place with its times."""

    t: Tensor
    noise: Tensor
    places: dict[EvalPoint, tuple[Tensor, Tensor]]
    known: Predictions  # what was predicted on the way


@dataclass(frozen=True)
class DistillationOutput:
    """A step's outcome: the loss to call backward on; g, of the first part the times, x_t, noise, and predictions by prompt at x_t.

    `terms` are the parts' weighted terms, in the order of the config: they add up to g before it is clipped.
    """

    loss: Tensor
    gradient: Tensor
    t: Tensor
    noise: Tensor
    x_t: Tensor
    predictions: dict[str, Prediction]
    terms: tuple[Tensor, ...]
    clean: Tensor  # the latents it was asked about
    conditions: PromptConditionings


class ScoreDistillation:
    """An objective on a frozen score model; call it on latents that are being optimised."""

    def __init__(
        self,
        model: ScoreModel,
        options: ObjectiveOptions,
        critic: ScoreModel | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`critic` answers the critic's terms; `decode` turns latents into images where the objective weighs them."""
        for part in options.parts:
            _check_weight(part, model)
        if options.needs_critic and critic is None:
            raise UserError(
                "the objective has a term of the critic: give a critic (a LoRA or a copy of the teacher)"
            )
        if options.image and decode is None:
            raise UserError("the objective weighs images: give a decoder")
        self.options, self.decode = options, decode
        self.model, self.critic = NFECounter(model), None if critic is None else NFECounter(critic)

    @property
    def nfe(self) -> int:
        """Forward passes so far, in samples; a critic's training is not among them."""
        return self.model.nfe + (0 if self.critic is None else self.critic.nfe)

    def __call__(
        self,
        latents: Tensor,
        conditions: PromptConditionings,
        progress: float,
        generator: torch.Generator,
        reference: Tensor | None = None,
        images: Tensor | None = None,
    ) -> DistillationOutput:
        """latents (B, C, h, w) with gradient; progress in [0, 1]; noise and times come from the CPU `generator`.

        One teacher call, and one a step of an inversion path. `reference` (B, C, h, w) is what DDS compares with; `images`
        (B, 3, H, W) in [0, 1] are what the latents encode, where the objective weighs them.
        """
        if self.options.needs_reference and reference is None:
            raise UserError("the objective has a term at the reference: give the reference's latents")
        clean, before = latents.detach(), self.nfe
        with torch.no_grad():
            draws = [
                self._draw(part, clean, conditions, progress, generator, reference)
                for part in self.options.parts
            ]
            known = self._predict(self.model, "teacher", draws, conditions, progress)
            judged = (
                self._predict(self.critic, "critic", draws, conditions, progress)
                if self.critic is not None
                else [{} for _ in draws]
            )
            terms: list[Tensor] = []
            for part, drawn, told, critic in zip(self.options.parts, draws, known, judged, strict=True):
                terms += self._terms(part, drawn, told, critic, clean, progress)
            total = sum(terms, torch.zeros_like(clean))
            gradient = _clip(
                total.clamp(-self.options.clamp, self.options.clamp) if self.options.clamp else total,
                self.options.clip,
            )
        self._check_cost((self.nfe - before) / len(clean), progress)
        loss = surrogate_loss(latents, gradient)
        if self.options.image and images is not None:
            loss = loss + self._image_loss(images, draws[0], known[0], progress)
        first = {name: prediction for (place, name), prediction in known[0].items() if place == "now"}
        return DistillationOutput(
            loss,
            gradient,
            draws[0].t,
            draws[0].noise,
            draws[0].places["now"][0],
            first,
            tuple(terms),
            clean,
            conditions,
        )

    def _check_cost(self, counted: float, progress: float) -> None:
        """Comparisons at equal compute rest on the stated cost: a loss that costs something else must not go on."""
        stated = sum(part.nfe(progress) for part in self.options.parts)
        if counted != stated:
            raise RuntimeError(
                f"the objective took {counted} forward passes a sample where it states {stated}: mend Part.forwards"
            )

    def _draw(
        self,
        part: LossComponent,
        clean: Tensor,
        conditions: PromptConditionings,
        progress: float,
        generator: torch.Generator,
        reference: Tensor | None,
    ) -> NoisyDraw:
        schedule, law, count = self.model.schedule, part.noise, len(clean)
        t = part.time.draw(count, schedule.num_train_timesteps, progress, generator).to(clean.device)
        if law.kind == "inversion":
            states = {name: conditions.select(name, count) for name in part.path_prompts}
            gap = round(number(law.gap, progress) * schedule.num_train_timesteps)
            path = invert(self.model, clean, t, states, law.guidance, law.steps, gap)
            noise = (path.x_t - schedule.alpha(t) * clean) / schedule.sigma(t)
            known: Predictions = {key: path.prediction for key in part.reused()}
            return NoisyDraw(t, noise, {"now": (path.x_t, t), "earlier": (path.x_s, path.s)}, known)
        source = torch.Generator().manual_seed(law.seed) if law.kind == "fixed" else generator
        noise = torch.randn(clean.shape, generator=source).to(clean)
        places: dict[EvalPoint, tuple[Tensor, Tensor]] = {"now": (schedule.add_noise(clean, noise, t), t)}
        if reference is not None:
            places["reference"] = (schedule.add_noise(reference, noise, t), t)
        return NoisyDraw(t, noise, places, {})

    def _predict(
        self,
        model: ScoreModel,
        of: Literal["teacher", "critic"],
        draws: Sequence[NoisyDraw],
        conditions: PromptConditionings,
        progress: float,
    ) -> list[Predictions]:
        """Everything the parts ask of a model, in one call."""
        known = [dict(drawn.known) if of == "teacher" else {} for drawn in draws]
        asked = [part.asked(of, progress) for part in self.options.parts]
        wanted = [(index, key) for index, keys in enumerate(asked) for key in keys if key not in known[index]]
        if not wanted:
            return known
        places = [draws[index].places[place] for index, (place, _) in wanted]
        count = len(places[0][0])
        states = torch.cat([conditions.select(name, count) for _, (_, name) in wanted])
        together = model.predict(torch.cat([x for x, _ in places]), torch.cat([t for _, t in places]), states)
        for (index, key), prediction in zip(wanted, together.chunk(len(wanted)), strict=True):
            known[index][key] = prediction
        return known

    def _terms(
        self,
        part: LossComponent,
        drawn: NoisyDraw,
        told: Predictions,
        critic: Predictions,
        clean: Tensor,
        progress: float,
    ) -> list[Tensor]:
        schedule = self.model.schedule
        factor = time_weight(part.weight, schedule.alpha(drawn.t), schedule.sigma(drawn.t))
        if part.normalise:
            factor = factor / (clean - guided_prediction(part.teacher, told, progress).x0).abs().mean(
                (1, 2, 3), keepdim=True
            )
        share = drawn.t[:, None, None, None] / schedule.num_train_timesteps
        values = []
        for term in part.active(progress):
            eps = (
                drawn.noise
                if term.predict == "noise"
                else guided_prediction(term, told if term.predict == "teacher" else critic, progress).eps
            )
            counts = (share >= term.times[0]) & (share < term.times[1] + (term.times[1] == 1.0))
            values.append(factor * number(term.coefficient, progress) * counts * eps)
        return values

    def _image_loss(self, images: Tensor, drawn: NoisyDraw, told: Predictions, progress: float) -> Tensor:
        assert self.decode is not None
        schedule = self.model.schedule
        alpha, sigma = schedule.alpha(drawn.t), schedule.sigma(drawn.t)
        guidance = self.options.image_guidance
        term = self.options.teacher if guidance is None else replace(self.options.teacher, guidance=guidance)
        with torch.no_grad():
            target = self.decode(guided_prediction(term, told, progress).x0)
            factor = self.options.image * time_weight(self.options.weight, alpha, sigma) * alpha / sigma
        return surrogate_loss(images, (factor * (images - target)).detach())


def _check_weight(part: LossComponent, model: ScoreModel) -> None:
    last = torch.tensor([round(max(part.time.high) * (model.schedule.num_train_timesteps - 1))])
    if part.weight == "sigma_over_alpha" and float(model.schedule.alpha(last)) == 0:
        raise UserError(
            "the weight sigma_over_alpha is infinite at the last level of this schedule: give time.high below 1"
        )


def guided_prediction(term: Term, known: Predictions, progress: float) -> Prediction:
    """A term's prediction from those it is made of: guidance, Perp-Neg, the contrast with other views, rescale."""
    bound = known[term.at, term.prompt]
    made = bound
    if term.guided:
        free, scale = known[term.at, term.negative_prompt], number(term.guidance, progress)
        made = free.extrapolate(bound, scale)
        if term.perp_neg:
            extrapolate = bound.eps - free.eps
            away = sum(
                _perpendicular(known[term.at, name].eps - free.eps, extrapolate) for name in OTHER_VIEWS
            )
            made = bound.with_eps(made.eps - scale * term.perp_neg * away)
    if term.contrast:
        others = sum(known[term.at, name].eps for name in OTHER_VIEWS) / len(OTHER_VIEWS)
        made = bound.with_eps(made.eps + term.contrast * (bound.eps - others))
    if term.rescale:
        spread = bound.x0.std((1, 2, 3), keepdim=True) / made.x0.std((1, 2, 3), keepdim=True)
        made = bound.with_x0(made.x0 * (term.rescale * spread + 1 - term.rescale))
    return made


def _perpendicular(vector: Tensor, onto: Tensor) -> Tensor:
    """The part of each sample's vector (B, C, H, W) that is perpendicular to another."""
    along = (vector * onto).sum((1, 2, 3), keepdim=True) / onto.square().sum(
        (1, 2, 3), keepdim=True
    ).clamp_min(1e-12)
    return vector - along * onto


def time_weight(name: Weight, alpha: Tensor, sigma: Tensor) -> Tensor:
    """w(t) from alpha and sigma (B, 1, 1, 1): the names say what it is."""
    if name == "one":
        return torch.ones_like(sigma)
    if name == "sigma":
        return sigma
    if name == "sigma_squared":
        return sigma.square()
    return alpha * sigma.square() if name == "alpha_sigma_squared" else sigma / alpha


def _clip(gradient: Tensor, limit: float) -> Tensor:
    if limit == 0:
        return gradient
    size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    return gradient * (limit / size.clamp_min(limit))


def surrogate_loss(latents: Tensor, gradient: Tensor) -> Tensor:
    """1/2 |z - stopgrad(z - g)|^2, summed over elements, mean over the batch: dL/dz = g / batch."""
    target = (latents - gradient).detach()
    return 0.5 * (latents - target).square().sum() / len(latents)


def text_conditions(
    encode: Callable[[Sequence[str]], Tensor],
    prompts: Sequence[str],
    options: ObjectiveOptions,
    negative: str = "",
    reference: str = "",
) -> PromptConditionings:
    """Conditions of prompts, one a sample, through a teacher's `encode_text`: what the objective asks for, and no more.

    A negative or reference prompt that is empty is not given.
    """
    shared = {"unconditional": "", "negative": negative, "reference": reference}
    states = {}
    for name in options.names:
        if name == "conditional":
            states[name] = encode(prompts)
        elif name in options.prompts:
            states[name] = encode([options.prompts[name].replace("{prompt}", prompt) for prompt in prompts])
        elif name in shared and (shared[name] or name == "unconditional"):
            states[name] = encode([shared[name]])
    return PromptConditionings(states)
