"""Part of a student's folder: the stock pipeline with a student's defaults, all of its steps and no guidance.

Of a student with a choice (student.json) they are the steps and the scale that it was trained to sample with.

Loaded by `DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)`;
needs diffusers only. Without either argument diffusers loads its own class: then pass the student's steps
and guidance_scale=1.
"""

import json
from pathlib import Path

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
        guidance_scale: float | None = None,
        **others: Argument,
    ) -> StableDiffusionPipelineOutput:
        """Images of prompts, in all of the student's steps by default."""
        steps = num_inference_steps or self._defaults.get("steps")
        scale = self._defaults.get("guidance") if guidance_scale is None else guidance_scale
        steps = steps or self.scheduler.config.original_inference_steps
        return super().__call__(prompt, num_inference_steps=steps, guidance_scale=scale or 1.0, **others)

    @property
    def _defaults(self) -> dict[str, float]:
        """What the folder's student.json holds, where there is one; only `steps` and `guidance` are read."""
        path = Path(self.name_or_path or "") / "student.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
