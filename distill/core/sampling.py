"""Sampling from any `ScoreModel` with diffusers' schedulers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from distill.core.noise import from_flow
from distill.core.score import Prediction, ScoreModel

Callback = Callable[[int, Prediction], None]
Scheduler = DDIMScheduler | DDPMScheduler | DPMSolverMultistepScheduler


@dataclass(frozen=True)
class Img2ImgInit:
    """What sampling starts from: clean latents (B, C, h, w), made noisy to a share `strength` of the steps (SDEdit, arXiv:2108.01073).

    With a mask (B, 1, h, w) only where it is 1 is drawn anew; elsewhere every step is laid over the picture at its own noise
    (RePaint, arXiv:2201.09865, eq. 8). As diffusers' image-to-image and inpainting pipelines do.
    """

    clean: Tensor
    strength: float = 1.0
    mask: Tensor | None = None


def _as(prediction: Prediction, kind: str) -> Tensor:
    """What a scheduler of that prediction type expects from the network."""
    return (
        {"epsilon": prediction.eps, "sample": prediction.x0}[kind] if kind != "v_prediction" else prediction.v
    )


@torch.no_grad()
def sample_ode(
    model: ScoreModel,
    scheduler: DDIMScheduler | DPMSolverMultistepScheduler,
    condition: Tensor,
    noise: Tensor,
    steps: int,
    watch: Callback | None = None,
    picture: Img2ImgInit | None = None,
) -> Tensor:
    """Latents (B, C, h, w) from standard normal noise along the probability-flow ODE, by the scheduler given.

    DDIM with eta 0 (Song et al. 2021, arXiv:2010.02502, eq. 12) or DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095).
    condition (B, ...); `watch` is called with the step and its prediction. Guidance: wrap the model in `Guided`.
    """
    return _sample(model, scheduler, condition, noise, steps, None, watch, picture)


@torch.no_grad()
def sample_flow(model: ScoreModel, condition: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Latents by Heun's method in flow time: dx / dtime = eps - x0, from 1 to 0, asking the model at the nearest of its times."""

    def velocity(x: Tensor, time: float) -> Tensor:
        x_t, alpha, sigma = from_flow(x, torch.full((len(x),), time).to(x)[:, None, None, None])
        t = model.schedule.sigma_to_t((sigma / alpha).flatten())
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
    watch: Callback | None = None,
    picture: Img2ImgInit | None = None,
) -> Tensor:
    """Latents by ancestral sampling (Ho et al. 2020, algorithm 2), its noise drawn from `generator`."""
    return _sample(model, scheduler, condition, noise, steps, generator, watch, picture)


def _sample(
    model: ScoreModel,
    scheduler: Scheduler,
    condition: Tensor,
    noise: Tensor,
    steps: int,
    generator: torch.Generator | None,
    watch: Callback | None,
    picture: Img2ImgInit | None = None,
) -> Tensor:
    scheduler = type(scheduler).from_config(scheduler.config)  # the caller's is left as it was
    scheduler.set_timesteps(steps, device=noise.device)
    times, x_t = scheduler.timesteps, noise * scheduler.init_noise_sigma
    if picture is not None:
        times, x_t = _begun(scheduler, noise, steps, picture)
    for number, t in enumerate(times):
        scaled = scheduler.scale_model_input(x_t, t)  # solvers that explode the variance carry x_t / alpha
        prediction = model.predict(scaled, t.round().long().expand(len(x_t)), condition)
        output = _as(prediction, scheduler.config.prediction_type)
        more = {} if generator is None else {"generator": generator}
        x_t = scheduler.step(output, t, x_t, **more).prev_sample
        if picture is not None and picture.mask is not None:
            left = number + 1 < len(times)
            kept = (
                scheduler.add_noise(picture.clean, noise, times[number + 1 : number + 2])
                if left
                else picture.clean
            )
            x_t = torch.lerp(kept, x_t, picture.mask)
        if watch is not None:
            watch(number, prediction)
    return x_t


def _begun(scheduler: Scheduler, noise: Tensor, steps: int, picture: Img2ImgInit) -> tuple[Tensor, Tensor]:
    """The times still to go and the picture made noisy to the first of them."""
    first = steps - min(int(steps * picture.strength), steps)
    times = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    whole = (
        picture.strength == 1 and picture.mask is not None
    )  # nothing of the picture is asked for where it is drawn anew
    return times, noise * scheduler.init_noise_sigma if whole else scheduler.add_noise(
        picture.clean, noise, times[:1]
    )
