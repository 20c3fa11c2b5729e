"""Sampling from any `ScoreModel` with diffusers' schedulers."""

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from distill.noise import from_flow
from distill.score import Prediction, ScoreModel

Watch = Callable[[int, Prediction], None]


def _as(prediction: Prediction, kind: str) -> Tensor:
    """What a scheduler of that prediction type expects from the network."""
    return {"epsilon": prediction.eps, "sample": prediction.x0}[kind] if kind != "v_prediction" else prediction.v


@torch.no_grad()
def sample_ddim(
    model: ScoreModel, scheduler: DDIMScheduler, condition: Tensor, noise: Tensor, steps: int, watch: Watch | None = None
) -> Tensor:
    """Latents (B, C, h, w) by DDIM, eta 0 (Song et al. 2021, arXiv:2010.02502, eq. 12) from standard normal noise.

    condition (B, ...); `watch` is called with the step and its prediction. Guidance: wrap the model in `Guided`.
    """
    return _sample(model, scheduler, condition, noise, steps, None, watch)


@torch.no_grad()
def sample_flow(model: ScoreModel, condition: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Latents by Heun's method in flow time: dx / dtime = eps - x0, from 1 to 0, asking the model at the nearest of its times."""

    def velocity(x: Tensor, time: float) -> Tensor:
        x_t, alpha, sigma = from_flow(x, torch.full((len(x),), time).to(x)[:, None, None, None])
        t = model.schedule.nearest((sigma / alpha).flatten())
        return model.predict(x_t, t, condition).flow

    x = noise
    for number in range(steps):
        now, following = 1 - number / steps, 1 - (number + 1) / steps
        first = velocity(x, max(min(now, 1 - 1e-4), 1e-4))
        second = velocity(x + (following - now) * first, max(following, 1e-4))
        x = x + (following - now) * (first + second) / 2
    return x


@torch.no_grad()
def sample_ddpm(
    model: ScoreModel,
    scheduler: DDPMScheduler,
    condition: Tensor,
    noise: Tensor,
    steps: int,
    generator: torch.Generator,
    watch: Watch | None = None,
) -> Tensor:
    """Latents by ancestral sampling (Ho et al. 2020, algorithm 2), its noise drawn from `generator`."""
    return _sample(model, scheduler, condition, noise, steps, generator, watch)


def _sample(
    model: ScoreModel,
    scheduler: DDIMScheduler | DDPMScheduler,
    condition: Tensor,
    noise: Tensor,
    steps: int,
    generator: torch.Generator | None,
    watch: Watch | None,
) -> Tensor:
    scheduler = type(scheduler).from_config(scheduler.config)  # the caller's is left as it was
    scheduler.set_timesteps(steps, device=noise.device)
    x_t = noise * scheduler.init_noise_sigma
    for number, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x_t, t)  # solvers that explode the variance carry x_t / alpha
        prediction = model.predict(scaled, t.round().long().expand(len(x_t)), condition)
        output = _as(prediction, scheduler.config.prediction_type)
        more = {} if generator is None else {"generator": generator}
        x_t = scheduler.step(output, t, x_t, **more).prev_sample
        if watch is not None:
            watch(number, prediction)
    return x_t
