"""What several tests of text-to-3D share: a small scene, options without schedules, a closed-form teacher."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule
from distill.core.score import Prediction
from distill.core.teacher import Teacher
from distill.objectives.options import ObjectiveOptions, Term
from distill.runtime.run import RunOptions
from sds3d.scene.encoding import HashEncodingOptions
from sds3d.scene.field import FieldOptions
from sds3d.scene.nerf import GridOptions, NerfOptions
from sds3d.scene.regularizers import RegularizerOptions
from sds3d.scene.renderer import RenderOptions
from sds3d.text_to_3d.stages.base import StageOptions
from sds3d.text_to_3d.stages.score_distillation import ScoreDistillationOptions
from sds3d.text_to_3d.trainer import TextTo3dOptions

SDS = ObjectiveOptions((Term("teacher"), Term("noise", -1.0)))
ZERO_GRADIENT = ObjectiveOptions((Term("noise", 0.0),))
NO_REGULARIZERS = RegularizerOptions(
    **{field.name: 0.0 for field in fields(RegularizerOptions) if field.name != "samples"}
)
SMALL = NerfOptions(
    FieldOptions(
        HashEncodingOptions(n_levels=2, n_features_per_level=2, log2_hashmap_size=12, base_resolution=8),
        hidden_width=16,
    ),
    GridOptions(resolution=16, every=4),
    RenderOptions(samples=24),
)
DISTILLATION = ScoreDistillationOptions(coarse_resolution=8)
OPTIONS = TextTo3dOptions(
    "a red ball",
    views=2,
    views_per_group=1,
    background=(0.5, 0.5),
    learning_rate=0.01,
    mlp_learning_rate=0.002,
    regularizers=NO_REGULARIZERS,
    stages={"score_distillation": DISTILLATION},
)


def with_stages(options: TextTo3dOptions, **stages: StageOptions) -> TextTo3dOptions:
    """The options with further stages, or with other options of a stage."""
    return replace(options, stages={**options.stages, **stages})


def run_options(directory: Path, steps: int) -> RunOptions:
    """Those of a short run with frequent checkpoints."""
    return RunOptions(
        str(directory), steps, checkpoint_every=3, preview_every=1000, trackers=(), device="cpu"
    )


def disc() -> Tensor:
    """A red disc (3, 16, 16) on grey: what every camera sees of a ball."""
    steps = (torch.arange(16) + 0.5) / 8 - 1
    inside = (steps[None] ** 2 + steps[:, None] ** 2 < 0.5**2).float()
    red = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    return red * inside + 0.5 * (1 - inside)


class OneImageTeacher(Teacher):
    """A teacher in pixel space whose x0 is normal around one image; it records prompts and NFE."""

    name_or_path = ""
    resolution = 16
    latent_shape = (3, 16, 16)
    device = torch.device("cpu")

    def __init__(self, image: Tensor, std: float = 0.05) -> None:
        self.schedule = NoiseSchedule(torch.linspace(0.999, 0.01, 1000))
        alphas = self.schedule.alpha(torch.arange(1000)).double().square().flatten()
        betas = 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])
        self.scheduler = DDIMScheduler(
            trained_betas=betas.tolist(), clip_sample=False, prediction_type="epsilon"
        )
        self.image, self.std = image, std
        self.prompts: list[str] = []
        self.nfe = 0

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        self.prompts += prompts
        return Conditioning(torch.zeros(len(prompts), 1, 1))

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        self.nfe += len(x_t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        eps = sigma * (x_t - alpha * self.mean(conditioning)) / (alpha**2 * self.std**2 + sigma**2)
        return Prediction.from_output(eps, x_t, t, self.schedule, "epsilon")

    def mean(self, conditioning: Conditioning) -> Tensor:
        """The mean of x0 under a conditioning."""
        return self.image
