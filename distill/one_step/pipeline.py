"""Travels in a student's folder: the stock pipeline with a student's defaults, all of its steps and no guidance.

Loaded by `DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)`; needs diffusers only. Without
either argument diffusers loads its own class: then ask for the student's steps and guidance_scale=1.
"""

from diffusers import StableDiffusionPipeline


class StudentPipeline(StableDiffusionPipeline):
    """`pipeline(prompt)` gives a student's image; any other argument of the stock pipeline can be given by name."""

    def __call__(self, prompt=None, num_inference_steps=None, guidance_scale=1.0, **others):
        steps = num_inference_steps or self.scheduler.config.original_inference_steps
        return super().__call__(prompt, num_inference_steps=steps, guidance_scale=guidance_scale, **others)
