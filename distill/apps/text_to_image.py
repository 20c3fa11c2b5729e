"""Text to image with any teacher: from noise or an image (SDEdit, inpainting), mixed prompts, guidance
sweeps, ranking by CLIP.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.core.conditioning import Conditioning
from distill.core.samplers import SamplerName, sample_by_name
from distill.core.sampling import Img2ImgInit
from distill.core.score import Guided, Prediction, guidance_nfe
from distill.core.teacher import Teacher
from distill.core.views import POSE
from distill.data.images import load_image
from distill.evaluation.clip import load_clip_scorer
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid


@dataclass(frozen=True)
class TextToImageOptions:
    """Images of prompts. An image's initial noise is a function of the seed and its position only."""

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    count: int = 4  # images of each prompt
    guidance: float = 3.0  # CFG scale; 1: no guidance, 0: no prompt
    steps: int = 25
    sampler: SamplerName = "ddim"
    # image side in pixels, of teachers that can have another; null: their own, which they were trained at
    resolution: int | None = None
    seed: int = 0
    animation: bool = False  # also write the predicted x0, and x_t, of every step as GIFs
    image: str | None = None  # a file to start from (SDEdit)
    mask: str | None = None  # a file, white where the image is to be replaced (inpainting)
    strength: float = 0.7  # with an image: the fraction of the steps that is sampled
    weights: tuple[float, ...] = ()  # one a prompt: the prompts become one, mixed in these proportions
    interpolate: int = 0  # that many mixtures from each prompt to the next
    sweep: tuple[float, ...] = ()  # guidance scales, each from the same noise
    candidates: int = 1  # samples for each image, of which the best by CLIP is returned
    clip: str | None = None  # a CLIP model of transformers to rank with; null: the teacher's own
    # cameras, in degrees: one image of each prompt from each, in place of `count`; 0 faces the front
    azimuths: tuple[float, ...] = ()
    elevation: float = 20.0  # of these cameras
    distance: float = 3.0  # of these cameras, in world units
    multi_view: bool = True  # the images of a prompt show one object, denoised together

    def __post_init__(self) -> None:
        if not self.prompts or min(self.count, self.steps, self.candidates) < 1:
            raise UserError("expected at least one prompt, and count, candidates and steps of at least 1")
        if not all(prompt.strip() for prompt in self.prompts):
            raise UserError("a prompt is empty: describe the image, for example 'a red teapot'")
        if self.mask is not None and self.image is None:
            raise UserError("a mask selects the region of an image to replace: give image= too")
        sampled = self.steps if self.image is None else int(self.steps * self.strength)
        if not 0 < self.strength <= 1 or sampled < 1:
            raise UserError(
                f"strength is {self.strength}: expected a fraction of the {self.steps} steps in (0, 1], "
                "at least one step"
            )
        if self.weights and (len(self.weights) != len(self.prompts) or sum(self.weights) == 0):
            raise UserError(
                f"{len(self.weights)} weights for {len(self.prompts)} prompts: expected one each, sum not 0"
            )
        if self.interpolate and (self.interpolate < 2 or len(self.prompts) < 2 or self.weights):
            raise UserError(
                "interpolate needs at least 2 mixtures between each of at least 2 prompts, and no weights"
            )
        if self.candidates > 1 and (self.weights or self.interpolate or self.sweep or self.animation):
            raise UserError(
                "candidates are ranked by their prompt: leave weights, interpolate, sweep and animation out"
            )

        if self.azimuths and (self.candidates > 1 or self.weights or self.interpolate):
            raise UserError("azimuths are of plain prompts: leave candidates, weights and interpolate out")
        if not -89 <= self.elevation <= 89 or self.distance <= 0:
            raise UserError(
                f"a camera at elevation {self.elevation:g}, distance {self.distance:g}: expected within "
                "[-89, 89] degrees and a positive distance"
            )

    @property
    def images_per_prompt(self) -> int:
        """`count`, or one a camera."""
        return len(self.azimuths) or self.count

    @property
    def nfe(self) -> int:
        """Function evaluations for one image: guidance counts twice, an image skips steps."""
        steps = self.steps if self.image is None else int(self.steps * self.strength)
        return steps * guidance_nfe(self.guidance) * self.candidates


class TextToImageOutput(NamedTuple):
    """Images (N, 3, H, W) on the CPU, prompt by prompt; of a sweep, scale by scale within each prompt.

    frames: with `animation`, grids (F, 3, H', W') of the decoded x0 and x_t at every step, by these names.
    """

    images: Tensor
    frames: dict[str, Tensor]


def prompt_conditioning(teacher: Teacher, options: TextToImageOptions) -> Conditioning:
    """The conditioning of the prompts, of their mixture (one row), or of those from each one to the next."""
    conditioning = teacher.encode_text(options.prompts)
    if options.weights:
        return conditioning.apply(lambda rows: _weighted_mean(rows, torch.tensor(options.weights)))
    if options.interpolate:
        return conditioning.apply(lambda rows: _interpolated(rows, options.interpolate))
    return conditioning


def _weighted_mean(rows: Tensor, weights: Tensor) -> Tensor:
    """One row (1, ...) of rows (P, ...) and weights (P,)."""
    weights = weights.to(rows)
    return torch.einsum("p,p...->...", weights / weights.sum(), rows)[None]


def _interpolated(rows: Tensor, count: int) -> Tensor:
    """Rows (count * (P - 1), ...) at equal distances from each of P rows to the next, both included."""
    fractions = torch.linspace(0, 1, count).to(rows).view(-1, *[1] * (rows.ndim - 1))
    return torch.cat([torch.lerp(a, b, fractions) for a, b in pairwise(rows)])


def initial_batch(teacher: Teacher, options: TextToImageOptions) -> tuple[Conditioning, Tensor]:
    """The conditioning and the initial noise (N, C, h, w) of all samples, prompt by prompt.

    Raises `UserError` where cameras are given to a teacher that knows none.
    """
    generator = torch.Generator().manual_seed(options.seed)
    per_prompt = options.images_per_prompt * options.candidates
    rows = prompt_conditioning(teacher, options).repeat_interleave(per_prompt)
    if options.azimuths:
        rows = with_cameras(teacher, rows, options)
    side = image_side(teacher, options) * teacher.latent_shape[1] // teacher.resolution
    noise = torch.randn(len(rows), teacher.latent_shape[0], side, side, generator=generator)
    return rows, noise.to(teacher.device)


def image_side(teacher: Teacher, options: TextToImageOptions) -> int:
    """The side of images in pixels. Raises `UserError` for one that the teacher cannot have."""
    side, multiple = options.resolution, teacher.size_multiple
    if side is None or side == teacher.resolution:
        return teacher.resolution
    if multiple is None:
        raise UserError(
            f"resolution is {side}, but the teacher {teacher.name_or_path} has images of "
            f"{teacher.resolution} pixels; of some pipelines that is an option in a YAML file "
            "(PipelineSource.resolution)"
        )
    if side < multiple or side % multiple:
        raise UserError(f"resolution is {side}: expected a multiple of {multiple}, as the networks need")
    return side


def with_cameras(teacher: Teacher, rows: Conditioning, options: TextToImageOptions) -> Conditioning:
    """The conditioning from the options' cameras, of an object at the centre of the image."""
    if not teacher.conditioned_on_cameras:
        raise UserError(
            f"azimuths are given, but the teacher {teacher.name_or_path} knows no cameras: "
            "name the view in the prompt ('a red car, side view'), or give a multi-view teacher"
        )
    angles = torch.deg2rad(torch.tensor([(azimuth, options.elevation) for azimuth in options.azimuths]))
    rest = torch.tensor([options.distance, 0.0, 0.0]).expand(len(angles), 3)
    poses = torch.cat([angles, rest], 1).repeat(len(rows) // len(angles), 1).to(teacher.device)
    return rows.with_extras(**{POSE: poses}).grouped(len(angles) if options.multi_view else 1)


def load_init(teacher: Teacher, options: TextToImageOptions, count: int) -> Img2ImgInit | None:
    """What `count` samples start from; None without an image. Raises `UserError` for an unreadable file."""
    if options.image is None:
        return None
    side = image_side(teacher, options)
    image = load_image(options.image, side).to(teacher.device)
    with torch.no_grad():
        clean = teacher.encode_images(image).expand(count, -1, -1, -1)
    if options.mask is None:
        return Img2ImgInit(clean, options.strength)
    mask = load_image(options.mask, side).mean(1, keepdim=True)
    mask = (F.interpolate(mask, size=clean.shape[2:]) >= 0.5).float()
    return Img2ImgInit(clean, options.strength, mask.to(teacher.device))


@torch.no_grad()
def text_to_image(teacher: Teacher, options: TextToImageOptions) -> TextToImageOutput:
    """Sample all images of the options in one batch, or in one for each scale of a sweep."""
    conditioning, noise = initial_batch(teacher, options)
    init = load_init(teacher, options, len(noise))
    uncond = teacher.encode_text([options.negative_prompt])
    frames: dict[str, list[Tensor]] = {"x0": [], "xt": []}

    def record(step: int, x_t: Tensor, prediction: Prediction) -> None:
        for name, latents in (("x0", prediction.x0), ("xt", x_t)):
            frames[name].append(image_grid(teacher.decode(latents).cpu(), options.images_per_prompt))

    callback = record if options.animation else None
    samples = []
    for scale in options.sweep or (options.guidance,):
        model = Guided(teacher, uncond, scale)
        generator = torch.Generator().manual_seed(options.seed)
        latents = sample_by_name(
            options.sampler,
            model,
            teacher.scheduler,
            conditioning,
            noise,
            options.steps,
            generator,
            callback,
            init,
        )
        per_prompt = options.images_per_prompt * options.candidates
        samples.append(teacher.decode(latents).cpu().unflatten(0, (-1, per_prompt)))

    images = torch.stack(samples, 1)  # (prompts, scales, per_prompt, 3, H, W)
    if options.candidates > 1:
        images = rank_by_clip(teacher, images[:, 0], options)
    recorded = {name: torch.stack(grids) for name, grids in frames.items() if grids}
    return TextToImageOutput(images.reshape(-1, *images.shape[-3:]), recorded)


def rank_by_clip(teacher: Teacher, images: Tensor, options: TextToImageOptions) -> Tensor:
    """Of each prompt's images (P, N, 3, H, W) the `count` of the highest CLIP scores, best first.

    Raises `UserError` for a teacher without a CLIP of its own where `clip` names none.
    """
    clip = load_clip_scorer(teacher.name_or_path, options.clip, teacher.device)
    if clip is None:
        raise UserError(f"{teacher.name_or_path} has no CLIP to rank with: give clip=, or set candidates=1")
    text = clip.text_features(options.prompts)
    best = []
    for candidates, features in zip(images, text, strict=True):
        scores = clip.image_features(candidates) @ features
        best.append(candidates[scores.argsort(descending=True)[: options.count]])
    return torch.stack(best)
