"""One algebra of first-order score distillation: g = w(t) * sum_i c_i eps_i(x; prompt_i), from
`ObjectiveOptions`.

The loss handed to autograd is 1/2 |z - stopgrad(z - g)|^2, summed over a sample's elements and averaged over
the batch, so that its gradient on each sample's latent is g / batch: weights mean the same at every
resolution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.score import NFECounter, Prediction, ScoreModel
from distill.objectives.inversion import invert
from distill.objectives.options import (
    PERP_NEG_PROMPTS,
    EvalPoint,
    LossComponent,
    ObjectiveOptions,
    Query,
    Term,
    Weight,
    resolve,
)
from distill.objectives.prompts import PromptConditionings
from distill.runtime.errors import UserError
from distill.runtime.processes import draw_rows
from distill.runtime.transfer import upload, upload_all

Predictions = dict[Query, Prediction]


@dataclass(frozen=True)
class NoisyDraw:
    """A component's draw: times (B,), the noise, and (x, times) at each evaluation point."""

    t: Tensor
    noise: Tensor
    inputs: dict[EvalPoint, tuple[Tensor, Tensor]]
    predictions: Predictions  # those of an inversion trajectory that the terms reuse


@dataclass(frozen=True)
class DistillationOutput:
    """The outcome of one step.

    loss: to call backward on. gradient: g (B, C, h, w). t, noise, x_t, predictions (by prompt, at x_t): of
    the first component. terms: the weighted terms of all components in the config's order; they add up to g
    before it is clipped. clean: the latents. conditionings: those it was called with.
    """

    loss: Tensor
    gradient: Tensor
    t: Tensor
    noise: Tensor
    x_t: Tensor
    predictions: dict[str, Prediction]
    terms: tuple[Tensor, ...]
    clean: Tensor
    conditionings: PromptConditionings


class ScoreDistillation:
    """An objective on a frozen score model; call it on latents that are optimised."""

    def __init__(
        self,
        model: ScoreModel,
        options: ObjectiveOptions,
        critic: ScoreModel | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`critic` predicts the critic's terms; `decode` turns latents into images for a residual in
        pixels.
        """
        for component in options.components:
            _check_weight(component, model)
        if options.needs_critic and critic is None:
            raise UserError(
                "the objective has a term of the critic: give a critic (a LoRA or a copy of the teacher)"
            )
        if options.image and decode is None:
            raise UserError("the objective weighs images: give a decoder")
        self.options, self.decode = options, decode
        self.model = NFECounter(model)
        self.critic = None if critic is None else NFECounter(critic)

    @property
    def nfe(self) -> int:
        """Function evaluations so far, in samples, without the critic's training."""
        return self.model.nfe + (0 if self.critic is None else self.critic.nfe)

    def __call__(
        self,
        latents: Tensor,
        conditionings: PromptConditionings,
        progress: float,
        generator: torch.Generator,
        reference: Tensor | None = None,
        images: Tensor | None = None,
    ) -> DistillationOutput:
        """latents (B, C, h, w) with gradient; progress in [0, 1]; noise and times from the CPU `generator`.

        Where the conditionings have groups of views, the times are equal within a group; noise never is.

        One batched call of the teacher, and one for each step of an inversion trajectory. `reference`
        (B, C, h, w) is DDS's; `images` (B, 3, H, W) in [0, 1] are what the latents encode, for a residual in
        pixels. Raises `UserError` where a term lacks its reference or prompt.
        """
        if self.options.needs_reference and reference is None:
            raise UserError("the objective has a term at the reference: give the reference's latents")
        clean, nfe_before = latents.detach(), self.nfe
        components, jacobian = self.options.components, self.options.jacobian
        if jacobian:
            clean = clean.clone().requires_grad_()

        with torch.set_grad_enabled(jacobian):
            draws = [self._draw(c, clean, conditionings, progress, generator, reference) for c in components]
            predictions = self._predict(self.model, "teacher", draws, conditionings, progress)
            critic_predictions: list[Predictions] = [{} for _ in draws]
            if self.critic is not None:
                critic_predictions = self._predict(self.critic, "critic", draws, conditionings, progress)
            terms: list[Tensor] = []
            for args in zip(components, draws, predictions, critic_predictions, strict=True):
                terms += self._terms(*args, clean, progress)
        if jacobian:
            terms, clean = [self._denoising_gradient(terms, draws[0], clean)], clean.detach()
        gradient = _clip(sum(terms, torch.zeros_like(clean)), self.options)
        self._check_nfe((self.nfe - nfe_before) / len(clean), progress)

        loss = surrogate_loss(latents, gradient)
        if self.options.image and images is not None:
            loss = loss + self._image_loss(images, draws[0], predictions[0], progress)
        return DistillationOutput(
            loss=loss,
            gradient=gradient,
            t=draws[0].t,
            noise=draws[0].noise,
            x_t=draws[0].inputs["now"][0].detach(),
            predictions={
                name: value.detach() for (point, name), value in predictions[0].items() if point == "now"
            },
            terms=tuple(terms),
            clean=clean,
            conditionings=conditionings,
        )

    def _denoising_gradient(self, terms: Sequence[Tensor], draw: NoisyDraw, clean: Tensor) -> Tensor:
        """The gradient (B, C, h, w) of w / 2 |sum of terms / w|^2 on the clean latents, with the Jacobian."""
        schedule = self.model.schedule
        weight = time_weight(self.options.weight, schedule.alpha(draw.t), schedule.sigma(draw.t))
        residual = sum(terms[1:], terms[0])
        return torch.autograd.grad(0.5 * (residual.square() / weight).sum(), clean)[0]

    def _check_nfe(self, counted: float, progress: float) -> None:
        """Comparisons at equal compute rely on the stated NFE, so a mismatch is a defect and stops the
        run.
        """
        stated = sum(component.nfe(progress) for component in self.options.components)
        if counted != stated:
            raise RuntimeError(
                f"the objective took {counted} NFE a sample but states {stated}: fix LossComponent.nfe"
            )

    def _draw(
        self,
        component: LossComponent,
        clean: Tensor,
        conditionings: PromptConditionings,
        progress: float,
        generator: torch.Generator,
        reference: Tensor | None,
    ) -> NoisyDraw:
        schedule, source, count = self.model.schedule, component.noise, len(clean)
        views = conditionings.views  # of a group, which has one noise level

        def times(groups: int) -> Tensor:
            return component.time.sample(groups, schedule.num_train_timesteps, progress, generator)

        t = draw_rows(times, count // views)
        t = t.repeat_interleave(views)
        if source.kind == "inversion":
            t = upload(t, clean.device)
            prompts = {name: conditionings.select(name, count) for name in component.trajectory_prompts}
            gap = round(resolve(source.gap, progress) * schedule.num_train_timesteps)
            trajectory = invert(self.model, clean, t, prompts, source.guidance, source.steps, gap)
            noise = (trajectory.x_t - schedule.alpha(t) * clean) / schedule.sigma(t)
            reused = {query: trajectory.prediction for query in component.reused_queries()}
            points: dict[EvalPoint, tuple[Tensor, Tensor]] = {
                "now": (trajectory.x_t, t),
                "earlier": (trajectory.x_s, trajectory.s),
            }
            return NoisyDraw(t, noise, points, reused)

        fixed = source.kind == "fixed"
        noise_generator = torch.Generator().manual_seed(source.seed) if fixed else generator
        noise = draw_rows(lambda rows: torch.randn(rows, *clean.shape[1:], generator=noise_generator), count)
        t, noise = upload_all([t, noise], clean.device)
        noise = noise.to(clean.dtype)
        inputs: dict[EvalPoint, tuple[Tensor, Tensor]] = {"now": (schedule.add_noise(clean, noise, t), t)}
        if reference is not None:
            inputs["reference"] = (schedule.add_noise(reference, noise, t), t)
        return NoisyDraw(t, noise, inputs, {})

    def _predict(
        self,
        model: ScoreModel,
        name: Literal["teacher", "critic"],
        draws: Sequence[NoisyDraw],
        conditionings: PromptConditionings,
        progress: float,
    ) -> list[Predictions]:
        """Everything the components need of a model, in one batched call."""
        predictions = [dict(draw.predictions) if name == "teacher" else {} for draw in draws]
        missing = [
            (index, query)
            for index, component in enumerate(self.options.components)
            for query in component.queries(name, progress)
            if query not in predictions[index]
        ]
        if not missing:
            return predictions

        inputs = [draws[index].inputs[point] for index, (point, _) in missing]
        x_t, t = (torch.cat(values) for values in zip(*inputs, strict=True))
        count = len(inputs[0][0])
        batch = Conditioning.cat([conditionings.select(prompt, count) for _, (_, prompt) in missing])
        parts = model.predict(x_t, t, batch).chunk(len(missing))
        for (index, query), prediction in zip(missing, parts, strict=True):
            predictions[index][query] = prediction
        return predictions

    def _terms(
        self,
        component: LossComponent,
        draw: NoisyDraw,
        predictions: Predictions,
        critic_predictions: Predictions,
        clean: Tensor,
        progress: float,
    ) -> list[Tensor]:
        schedule = self.model.schedule
        weight = time_weight(component.weight, schedule.alpha(draw.t), schedule.sigma(draw.t))
        if component.normalise:
            x0 = guided_prediction(component.teacher, predictions, progress).x0
            weight = weight / (clean - x0).abs().mean((1, 2, 3), keepdim=True)

        fraction = draw.t[:, None, None, None] / schedule.num_train_timesteps
        values = []
        for term in component.active(progress):
            if term.predict == "noise":
                eps = draw.noise
            else:
                source = predictions if term.predict == "teacher" else critic_predictions
                eps = guided_prediction(term, source, progress).eps
            low, high = term.t_range
            inside = (fraction >= low) & (fraction < high + (high == 1.0))
            values.append(weight * resolve(term.coefficient, progress) * inside * eps)
        return values

    def _image_loss(
        self, images: Tensor, draw: NoisyDraw, predictions: Predictions, progress: float
    ) -> Tensor:
        assert self.decode is not None
        alpha, sigma = self.model.schedule.alpha(draw.t), self.model.schedule.sigma(draw.t)
        term = self.options.teacher
        if self.options.image_guidance is not None:
            term = replace(term, guidance=self.options.image_guidance)
        with torch.no_grad():
            target = self.decode(guided_prediction(term, predictions, progress).x0)
            weight = self.options.image * time_weight(self.options.weight, alpha, sigma) * alpha / sigma
        return surrogate_loss(images, (weight * (images - target)).detach())


def _check_weight(component: LossComponent, model: ScoreModel) -> None:
    last = torch.tensor([round(max(component.time.high) * (model.schedule.num_train_timesteps - 1))])
    if component.weight == "sigma_over_alpha" and float(model.schedule.alpha(last)) == 0:
        raise UserError("the weight sigma_over_alpha is infinite at the last level: give time.high below 1")


def guided_prediction(term: Term, predictions: Predictions, progress: float) -> Prediction:
    """A term's prediction from those it is made of: CFG, Perp-Neg, contrast with other prompts, CFG
    rescale.
    """
    point = term.eval_point
    cond = result = predictions[point, term.prompt]
    if term.guided:
        uncond, scale = predictions[point, term.negative_prompt], resolve(term.guidance, progress)
        result = uncond.extrapolate(cond, scale)
        if term.perp_neg:
            direction = cond.eps - uncond.eps
            repelled = [predictions[point, name].eps - uncond.eps for name in PERP_NEG_PROMPTS]
            perpendicular = sum(_perpendicular(eps, direction) for eps in repelled)
            result = cond.with_eps(result.eps - scale * term.perp_neg * perpendicular)
    if term.contrast:
        mean = sum(predictions[point, name].eps for name in PERP_NEG_PROMPTS) / len(PERP_NEG_PROMPTS)
        result = cond.with_eps(result.eps + term.contrast * (cond.eps - mean))
    if term.rescale:
        std_ratio = cond.x0.std((1, 2, 3), keepdim=True) / result.x0.std((1, 2, 3), keepdim=True)
        result = cond.with_x0(result.x0 * (term.rescale * std_ratio + 1 - term.rescale))
    return result


def _perpendicular(vector: Tensor, onto: Tensor) -> Tensor:
    """The component of each sample's vector (B, C, H, W) that is perpendicular to another."""
    square = onto.square().sum((1, 2, 3), keepdim=True).clamp_min(1e-12)
    return vector - (vector * onto).sum((1, 2, 3), keepdim=True) / square * onto


def time_weight(name: Weight, alpha: Tensor, sigma: Tensor) -> Tensor:
    """w(t) from alpha and sigma (B, 1, 1, 1), by name."""
    if name == "one":
        return torch.ones_like(sigma)
    if name == "sigma":
        return sigma
    if name == "sigma_squared":
        return sigma.square()
    return alpha * sigma.square() if name == "alpha_sigma_squared" else sigma / alpha


def _clip(gradient: Tensor, options: ObjectiveOptions) -> Tensor:
    if options.clamp:
        gradient = gradient.clamp(-options.clamp, options.clamp)
    if not options.clip:
        return gradient
    rms = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    return gradient * (options.clip / rms.clamp_min(options.clip))


def surrogate_loss(latents: Tensor, gradient: Tensor) -> Tensor:
    """1/2 |z - stopgrad(z - g)|^2, summed over elements, mean over the batch: dL/dz = g / batch."""
    target = (latents - gradient).detach()
    return 0.5 * (latents - target).square().sum() / len(latents)
