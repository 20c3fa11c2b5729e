"""Samplers by name, on the noise schedule of any teacher."""

from typing import Literal, cast, get_args

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.flow_scheduler import FlowScheduler
from distill.core.sampling import Callback, Img2ImgInit, OdeScheduler, sample_ddpm, sample_ode
from distill.core.score import ScoreModel
from distill.runtime.errors import UserError

# ddpm_mean: ancestral sampling without its added noise, which collapses to blurred images
SamplerName = Literal["ddim", "ddpm", "dpm", "ddpm_mean"]


class MeanDDPMScheduler(DDPMScheduler):
    """DDPM whose every step is the mean of the step's distribution."""

    def _get_variance(
        self, t: int, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor:
        return super()._get_variance(t, predicted_variance, variance_type) * 0


def parse_sampler(text: str, steps: int) -> tuple[SamplerName, int]:
    """`ddpm:500` as a sampler and its steps; `ddpm` has `steps`. Raises `UserError` for anything else."""
    name, colon, number = text.partition(":")
    if name not in get_args(SamplerName) or (colon and (not number.strip().isdecimal() or int(number) < 1)):
        raise UserError(
            f"compare_samplers has {text!r}: expected {', '.join(get_args(SamplerName))}, "
            "each with its number of steps or without, for example ddpm:500"
        )
    return cast(SamplerName, name), int(number) if colon else steps


def sample_by_name(
    name: SamplerName,
    model: ScoreModel,
    scheduler: OdeScheduler,
    conditioning: Conditioning,
    noise: Tensor,
    steps: int,
    generator: torch.Generator,
    callback: Callback | None = None,
    init: Img2ImgInit | None = None,
) -> Tensor:
    """Latents (B, C, h, w) from standard normal noise; ddpm's own noise is from `generator`.

    scheduler: the teacher's, whose schedule all samplers have. Raises `UserError` for a flow with another
    sampler than ddim, which is Euler's method there.
    """
    if isinstance(scheduler, FlowScheduler) and name != "ddim":
        raise UserError(
            f"sampler is {name}, but the teacher is a flow: give sampler=ddim, which is Euler's method there"
        )
    if name in ("ddpm", "ddpm_mean"):
        ancestral = (DDPMScheduler if name == "ddpm" else MeanDDPMScheduler).from_config(scheduler.config)
        return sample_ddpm(model, ancestral, conditioning, noise, steps, generator, callback, init)
    solver = scheduler if name == "ddim" else DPMSolverMultistepScheduler.from_config(scheduler.config)
    return sample_ode(model, solver, conditioning, noise, steps, callback, init)
