"""diffusers' scheduler of flow models, on the variance-preserving latents that every model here takes."""

from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from distill.core.noise import FlowSchedule, NoiseSchedule, PredictionType, from_flow


class FlowScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler's method on dx/ds = eps - x0 along x = (1 - s) x0 + s eps; timesteps are T s.

    x is carried unscaled, as by diffusers; `scale_model_input` gives the variance-preserving x_t.
    """

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """x_t (B, C, h, w) of x at a timestep ()."""
        time = (timestep / self.config.num_train_timesteps).to(sample.device)
        return from_flow(sample, time)[0]

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x of clean latents and noise (B, C, h, w) at timesteps (1,) of the current run."""
        return self.scale_noise(clean, timesteps, noise)


def ode_scheduler(stock: Any) -> DDIMScheduler | FlowScheduler:
    """The deterministic sampler for a pipeline's scheduler: DDIM, or of a flow Euler's method.

    DDIM does not clip what it predicts: latents have no bounds, and diffusers' default is [-1, 1].
    """
    if isinstance(stock, FlowMatchEulerDiscreteScheduler):
        return FlowScheduler.from_config(stock.config)
    return DDIMScheduler.from_config(stock.config, clip_sample=False)


def parameterisation(scheduler: DDIMScheduler | FlowScheduler) -> tuple[NoiseSchedule, PredictionType]:
    """The noise schedule of a scheduler, and what its network predicts."""
    if isinstance(scheduler, FlowScheduler):
        return FlowSchedule(scheduler.config.num_train_timesteps), "flow_prediction"
    return NoiseSchedule(scheduler.alphas_cumprod), scheduler.config.prediction_type
