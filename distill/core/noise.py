"""Noise schedules and conversions between parameterisations and between diffusion processes.

`alpha` is the square root of the cumulative product, `sigma` = sqrt(1 - alpha^2), and
x_t = alpha x0 + sigma eps.
"""

from typing import Literal, final

import torch
from torch import Tensor

from distill.runtime.errors import UserError
from distill.runtime.transfer import upload_all

# What a network outputs, by diffusers' names.
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]


class NoiseSchedule:
    """Discrete variance-preserving schedule (Ho et al. 2020, eq. 4).

    Integer times t run from 0 (almost clean) to `num_train_timesteps` - 1.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        """alphas_cumprod (T,), decreasing from near 1; its last entry may be 0 (zero terminal SNR)."""
        product = alphas_cumprod.double()
        decreasing = product.ndim == 1 and len(product) >= 2 and bool((product.diff() < 0).all())
        if not decreasing or product[-1] < 0 or product[0] > 1:
            raise UserError("alphas_cumprod must be a decreasing sequence within [0, 1]")
        self._alpha, self._sigma = product.sqrt().float(), (1 - product).sqrt().float()
        self._tables = {self._alpha.device: (self._alpha, self._sigma)}

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of noise levels."""
        return len(self._alpha)

    def alpha(self, t: Tensor) -> Tensor:
        """alpha at integer times (B,), shaped (B, 1, 1, 1) for images and latents, on t's device."""
        return self._on(t.device)[0][t][:, None, None, None]

    def sigma(self, t: Tensor) -> Tensor:
        """sigma at integer times (B,), shaped (B, 1, 1, 1)."""
        return self._on(t.device)[1][t][:, None, None, None]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """alpha and sigma (T,) on a device, uploaded once."""
        if device not in self._tables:
            alpha, sigma = upload_all([self._alpha, self._sigma], device)
            self._tables[device] = alpha, sigma
        return self._tables[device]

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of clean (B, C, H, W) and standard normal noise of the same shape at times (B,)."""
        return self.alpha(t) * clean + self.sigma(t) * noise

    def velocity(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv:2202.00512, section 4)."""
        return self.alpha(t) * noise - self.sigma(t) * clean

    def target(self, clean: Tensor, noise: Tensor, t: Tensor, prediction_type: PredictionType) -> Tensor:
        """The training target (B, C, H, W) of a network of that parameterisation.

        Raises `UserError` for an unknown one.
        """
        if prediction_type == "v_prediction":
            return self.velocity(clean, noise, t)
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return clean
        if prediction_type == "flow_prediction":
            return noise - clean
        raise _unknown(prediction_type)

    def time_of(self, timestep: Tensor) -> Tensor:
        """The times that a diffusers scheduler's timesteps stand for: the nearest integers."""
        return timestep.round().long()

    def posterior_weight(self, t: Tensor) -> Tensor:
        """The coefficient (B,) of x0 in the mean of q(x_{t-1} | x_t, x0) at integer times (B,); 1 at time 0.

        sqrt(abar_{t-1}) beta_t / (1 - abar_t), Ho et al. 2020 (arXiv:2006.11239), eq. 7.
        """
        signal = self.alpha(t).flatten().square()
        before = torch.where(t > 0, self.alpha((t - 1).clamp_min(0)).flatten().square(), 1.0)
        return before.sqrt() * (1 - signal / before) / (1 - signal)

    def betas(self, count: int) -> list[float]:
        """The first `count` betas, 1 - the ratio of consecutive cumulative products (diffusers'
        `trained_betas`).
        """
        product = self.alpha(torch.arange(count)).flatten().double().square()
        return (1 - product / torch.cat([torch.ones(1, dtype=torch.float64), product[:-1]])).tolist()

    def angle(self, t: Tensor) -> Tensor:
        """The angle (B,) in radians whose cosine is alpha and whose sine is sigma, at integer times (B,)."""
        return torch.atan2(self.sigma(t), self.alpha(t)).flatten()

    def angle_to_t(self, angle: Tensor) -> Tensor:
        """Fractional times (B,) of angles (B,), linear between the integer ones, differentiable."""
        alpha, sigma = self._on(angle.device)
        angles = torch.atan2(sigma, alpha)
        index = torch.searchsorted(angles, angle.detach().contiguous()).clamp(1, len(angles) - 1)
        low, high = angles[index - 1], angles[index]
        return index - 1 + ((angle - low) / (high - low)).clamp(0, 1)

    def sigma_to_t(self, noise_to_signal: Tensor) -> Tensor:
        """The times (B,) whose sigma / alpha is nearest, on a log scale, to `noise_to_signal` (B,)."""
        alpha, sigma = self._on(noise_to_signal.device)
        levels = (sigma.double() / alpha.double().clamp_min(1e-12)).log()
        return (levels[None] - noise_to_signal.double().log()[:, None]).abs().argmin(1)


@final
class FlowSchedule(NoiseSchedule):
    """The linear path (1 - s) x0 + s eps of flow matching, scaled to unit variance.

    Time t stands for s = (t + 1) / T, so that the last one is pure noise, as in diffusers'
    `FlowMatchEulerDiscreteScheduler` without shift. Times may be fractions, as samplers of flows use.
    """

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        time = torch.arange(1, num_train_timesteps + 1).double() / num_train_timesteps
        super().__init__((1 - time).square() / ((1 - time).square() + time.square()))

    def alpha(self, t: Tensor) -> Tensor:
        """As of every schedule, at fractional times too."""
        return (1 - self._path(t)) * self._norm(t) if t.is_floating_point() else super().alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        """As of every schedule, at fractional times too."""
        return self._path(t) * self._norm(t) if t.is_floating_point() else super().sigma(t)

    def _path(self, t: Tensor) -> Tensor:
        """s (B, 1, 1, 1) at times (B,)."""
        return ((t + 1) / self.num_train_timesteps)[:, None, None, None]

    def _norm(self, t: Tensor) -> Tensor:
        time = self._path(t)
        return ((1 - time).square() + time.square()).rsqrt()

    def angle_to_t(self, angle: Tensor) -> Tensor:
        """As of every schedule, exact."""
        path = angle.sin() / (angle.sin() + angle.cos())
        return (self.num_train_timesteps * path - 1).clamp(0, self.num_train_timesteps - 1)

    def time_of(self, timestep: Tensor) -> Tensor:
        """Fractional times of a flow scheduler's timesteps, T s."""
        return timestep.float() - 1


def to_variance_exploding(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x0 + s eps and its noise level s = sigma / alpha (Karras et al. 2022, arXiv:2206.00364, section 4)."""
    return x_t / alpha, sigma / alpha


def from_variance_exploding(x: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The variance-preserving x_t with its alpha and sigma, of x0 + level eps."""
    alpha = (1 + level.square()).rsqrt()
    return alpha * x, alpha, level * alpha


def to_flow(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - time) x0 + time eps and its time in [0, 1] (Lipman et al. 2023, arXiv:2210.02747, linear path)."""
    return x_t / (alpha + sigma), sigma / (alpha + sigma)


def from_flow(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The variance-preserving x_t with its alpha and sigma, of (1 - time) x0 + time eps."""
    norm = ((1 - time).square() + time.square()).sqrt()
    return x / norm, (1 - time) / norm, time / norm


def clean_and_noise(
    output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """x0 and eps of a network's output in any parameterisation, in float32 at least; shapes broadcast with
    x_t.

    From v and flow both are well conditioned at every level; from eps, x0 divides by alpha; from x0, eps
    divides by sigma. Raises `UserError` for an unknown parameterisation.
    """
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))

    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha, output
    if prediction_type == "sample":
        return output, (x_t - alpha * output) / sigma
    if prediction_type == "flow_prediction":
        total = alpha + sigma
        return (x_t - sigma * output) / total, (x_t + alpha * output) / total
    raise _unknown(prediction_type)


def _unknown(prediction_type: str) -> UserError:
    return UserError(
        f"prediction type {prediction_type!r} is unknown: expected epsilon, v_prediction, sample or "
        "flow_prediction"
    )
