"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952): two text encoders, sizes and crops."""

from typing import Any, final

import torch

from distill.core.conditioning import POOLED, TIME_IDS, Conditioning
from distill.core.flow_scheduler import ode_scheduler, parameterisation
from distill.core.identity import TeacherIdentity
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.pipeline import LatentTeacher


@final
class StableDiffusionXLTeacher(LatentTeacher):
    """A `StableDiffusionXLPipeline`.

    It is asked for uncropped images of its own resolution.
    """

    denoiser: UNetDenoiser

    def __init__(
        self, pipeline: Any, name_or_path: str = "", identity: TeacherIdentity | None = None
    ) -> None:
        """pipeline: a `StableDiffusionXLPipeline`, whose parts are frozen."""
        self.pipeline = pipeline
        scheduler = ode_scheduler(pipeline.scheduler)
        denoiser = UNetDenoiser(pipeline.unet, *parameterisation(scheduler))
        if pipeline.vae.config.force_upcast and pipeline.vae.dtype == torch.float16:
            pipeline.vae.float()  # its activations exceed half precision, as diffusers knows too
        encoders = [
            encoder for encoder in (pipeline.text_encoder, pipeline.text_encoder_2) if encoder is not None
        ]
        super().__init__(denoiser, scheduler, pipeline.vae, encoders, name_or_path, identity)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent at the pipeline's default size."""
        side = self.pipeline.default_sample_size
        return self.vae.config.latent_channels, side, side

    @property
    def unet(self) -> Any:
        """The U-Net itself, for what only a U-Net can do."""
        return self.denoiser.network

    def encode_new(self, prompts: list[str]) -> Conditioning:
        """Hidden states (B, L, D) of both text encoders, one pooled embedding (B, P), time ids (B, 6).

        Those of the empty prompt are zeros where the model was trained so.
        """
        embedding, _, pooled, _ = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            given = torch.tensor([bool(prompt) for prompt in prompts], device=embedding.device)
            embedding, pooled = embedding * given[:, None, None], pooled * given[:, None]
        size, corner = (self.resolution, self.resolution), (0, 0)
        ids = torch.tensor([*size, *corner, *size], dtype=torch.float32, device=embedding.device)
        return Conditioning(embedding, {POOLED: pooled, TIME_IDS: ids.expand(len(prompts), -1)})
