"""diffusers' scheduler of flow models, on the variance-preserving latents that every model here takes."""

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from distill.core.noise import from_flow


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
