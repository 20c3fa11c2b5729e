"""Sampling from any `ScoreModel`: diffusers' schedulers, and the probability-flow ODE in three
formulations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.flow_scheduler import FlowScheduler
from distill.core.noise import from_flow, from_variance_exploding
from distill.core.score import Prediction, ScoreModel
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload

Callback = Callable[[int, Tensor, Prediction], None]  # the step, its x_t and its prediction
OdeScheduler: TypeAlias = DDIMScheduler | DPMSolverMultistepScheduler | FlowScheduler
Scheduler: TypeAlias = OdeScheduler | DDPMScheduler
Formulation = Literal["vp", "ve", "flow"]


@dataclass(frozen=True)
class Img2ImgInit:
    """Clean latents (B, C, h, w) that sampling starts from, noised to a fraction `strength` of the steps.

    SDEdit, arXiv:2108.01073. With a mask (B, 1, h, w) only the region where it is 1 is sampled; elsewhere
    every step is replaced by the latents at its own noise level (RePaint, arXiv:2201.09865, eq. 8). As
    diffusers' image-to-image and inpainting pipelines do.
    """

    clean: Tensor
    strength: float = 1.0
    mask: Tensor | None = None


def _scheduler_input(prediction: Prediction, scheduler: Scheduler) -> Tensor:
    """What a scheduler expects from the network, by its prediction type."""
    prediction_type = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction_type == "v_prediction":
        return prediction.v
    if prediction_type == "flow_prediction":
        return prediction.flow
    return {"epsilon": prediction.eps, "sample": prediction.x0}[prediction_type]


@torch.no_grad()
def sample_ode(
    model: ScoreModel,
    scheduler: OdeScheduler,
    conditioning: Conditioning,
    noise: Tensor,
    steps: int,
    callback: Callback | None = None,
    init: Img2ImgInit | None = None,
) -> Tensor:
    """Latents (B, C, h, w) from standard normal noise along the probability-flow ODE, by the scheduler given.

    DDIM with eta 0 (Song et al. 2021, arXiv:2010.02502, eq. 12), DPM-Solver++ (Lu et al. 2022,
    arXiv:2211.01095), or Euler's method on a flow (Lipman et al. 2023, arXiv:2210.02747), which is DDIM in
    other variables. Guidance: wrap the model in `Guided`. Raises `UserError` for more steps than the
    schedule has.
    """
    return _sample(model, scheduler, conditioning, noise, steps, None, callback, init)


@torch.no_grad()
def sample_ddpm(
    model: ScoreModel,
    scheduler: DDPMScheduler,
    conditioning: Conditioning,
    noise: Tensor,
    steps: int,
    generator: torch.Generator,
    callback: Callback | None = None,
    init: Img2ImgInit | None = None,
) -> Tensor:
    """Latents by ancestral sampling (Ho et al. 2020, algorithm 2), its noise from `generator`."""
    return _sample(model, scheduler, conditioning, noise, steps, generator, callback, init)


def _sample(
    model: ScoreModel,
    scheduler: Scheduler,
    conditioning: Conditioning,
    noise: Tensor,
    steps: int,
    generator: torch.Generator | None,
    callback: Callback | None,
    init: Img2ImgInit | None,
) -> Tensor:
    if not 1 <= steps <= model.schedule.num_train_timesteps:
        raise UserError(
            f"steps is {steps}: expected 1 to {model.schedule.num_train_timesteps}, the schedule's"
        )
    scheduler = type(scheduler).from_config(scheduler.config)  # the caller's stays as it is
    scheduler.set_timesteps(steps)
    x_t = noise * scheduler.init_noise_sigma
    host_timesteps = scheduler.timesteps  # the scheduler reads them at every step
    timesteps = upload(host_timesteps, noise.device)
    if init is not None:
        first = _first_step(steps, init.strength)
        host_timesteps, timesteps = host_timesteps[first:], timesteps[first:]
        x_t = _init_img2img(scheduler, noise, first, timesteps, init)

    for step, t in enumerate(host_timesteps):
        # solvers of flows carry x_t / (alpha + sigma), variance-exploding ones x_t / alpha
        scaled = scheduler.scale_model_input(x_t, t)
        times = model.schedule.time_of(timesteps[step]).expand(len(x_t))
        prediction = model.predict(scaled, times, conditioning)
        if callback is not None:
            callback(step, scaled, prediction)
        output = _scheduler_input(prediction, scheduler)
        options = {} if generator is None else {"generator": generator}
        x_t = scheduler.step(output, t, x_t, **options).prev_sample

        if init is not None and init.mask is not None:
            last = step + 1 == len(timesteps)
            following = timesteps[step + 1 : step + 2]
            background = init.clean if last else scheduler.add_noise(init.clean, noise, following)
            x_t = torch.lerp(background, x_t, init.mask)
    return x_t


def _first_step(steps: int, strength: float) -> int:
    """How many of the steps a strength leaves out."""
    return steps - min(int(steps * strength), steps)


def _init_img2img(
    scheduler: Scheduler, noise: Tensor, first: int, timesteps: Tensor, init: Img2ImgInit
) -> Tensor:
    """The initial latents, noised to the first of the remaining timesteps."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    if init.strength == 1 and init.mask is not None:  # pure noise inside the mask, as diffusers does
        return noise * scheduler.init_noise_sigma
    return scheduler.add_noise(init.clean, noise, timesteps[:1])


@torch.no_grad()
def sample_heun(
    model: ScoreModel, conditioning: Conditioning, noise: Tensor, steps: int, formulation: Formulation
) -> Tensor:
    """Latents (B, C, h, w) by Heun's method on the probability-flow ODE, from standard normal noise.

    The three formulations are the same ODE in other variables: `vp`, x = cos(u) x0 + sin(u) eps with
    dx/du = v; `ve`, x = x0 + u eps with dx/du = eps, spaced as in Karras et al. 2022 (arXiv:2206.00364,
    eq. 5); `flow`, x = (1 - u) x0 + u eps with dx/du = eps - x0. The model is evaluated at the nearest of
    its integer times, so results agree up to discretisation.
    """

    def derivative(x: Tensor, u: float) -> Tensor:
        x_t, alpha, sigma = _to_variance_preserving(x, u, formulation)
        t = model.schedule.sigma_to_t((sigma / alpha).flatten())
        prediction = model.predict(x_t, t, conditioning)
        return {"vp": prediction.v, "ve": prediction.eps, "flow": prediction.flow}[formulation]

    times = _heun_times(model, steps, formulation)
    least, largest = (1e-4, 1 - 1e-4) if formulation == "flow" else (1e-4, times[0])
    x = noise * (times[0] if formulation == "ve" else 1.0)
    for now, following in pairwise(times):
        first = derivative(x, max(min(now, largest), least))
        second = derivative(x + (following - now) * first, max(following, least))
        x = x + (following - now) * (first + second) / 2
    return x


def _heun_times(model: ScoreModel, steps: int, formulation: Formulation, rho: float = 7.0) -> list[float]:
    """steps + 1 values of u from pure noise, which is the schedule's last level, to 0."""
    fractions = [1 - i / steps for i in range(steps + 1)]
    if formulation == "flow":
        return fractions

    last = torch.tensor([model.schedule.num_train_timesteps - 1])
    alpha, sigma = float(model.schedule.alpha(last)), float(model.schedule.sigma(last))
    sigma_max = min(sigma / max(alpha, 1e-12), 80.0)  # infinite at zero terminal SNR; 80 as in EDM
    if formulation == "vp":
        return [math.atan(sigma_max) * fraction for fraction in fractions]
    low, high = 0.002 ** (1 / rho), sigma_max ** (1 / rho)
    return [(low + fraction * (high - low)) ** rho for fraction in fractions[:-1]] + [0.0]


def _to_variance_preserving(x: Tensor, u: float, formulation: Formulation) -> tuple[Tensor, Tensor, Tensor]:
    """x_t with its alpha and sigma (B, 1, 1, 1)."""
    value = x.new_full((len(x), 1, 1, 1), u)
    if formulation == "flow":
        return from_flow(x, value)
    if formulation == "ve":
        return from_variance_exploding(x, value)
    return x, value.cos(), value.sin()
