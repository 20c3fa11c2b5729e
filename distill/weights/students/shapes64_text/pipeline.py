"""Part of a student's folder: the stock pipeline with a student's defaults, all of its steps and no guidance.

Loaded by `DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)`;
needs diffusers only. Without either argument diffusers loads its own class: then pass the student's steps
and guidance_scale=1.
"""

import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

Argument = torch.Tensor | torch.Generator | list[str] | str | int | float | None


class StudentPipeline(StableDiffusionPipeline):
    """`pipeline(prompt)` samples a student; the stock pipeline's other arguments can be given by name."""

    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        **others: Argument,
    ) -> StableDiffusionPipelineOutput:
        """Images of prompts, in all of the student's steps by default."""
        steps = num_inference_steps or self.scheduler.config.original_inference_steps
        return super().__call__(prompt, num_inference_steps=steps, guidance_scale=guidance_scale, **others)
