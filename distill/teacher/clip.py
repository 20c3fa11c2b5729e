"""CLIP (Radford et al. 2021, arXiv:2103.00020): `transformers.CLIPModel` on a captioned folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from distill.data.augmentation import add_noise, bernoulli_mask, blur_sharpen, random_affine
from distill.data.folders import CaptionedImages, batch_indices, grey_levels
from distill.runtime.optim import one_cycle, optimizer_step
from distill.runtime.run import Run
from distill.teacher.hard_negatives import HardNegatives
from distill.teacher.vocabulary import check_length

MEAN = (0.5, 0.5, 0.5)  # pixel normalisation, in the image processor's files too
STD = (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class ClipOptions:
    """Size and training of CLIP: first with random negatives, then with hard ones."""

    width: int = 128
    layers: int = 4
    patch: int = 8
    text_width: int = 96
    text_layers: int = 3
    context_length: int = 24  # tokens of a caption or prompt, start and end included: 22 words
    projection: int = 96
    batch: int = 96
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    image_to_text: float = 0.5  # loss weight of image-to-text; 1 minus it of text-to-image
    negatives: int = 256  # further random captions an image is contrasted with
    mirror: bool = True  # half of the images, in the first stage; false where captions say left or right
    hard_negatives: int = 4  # in the second stage: captions one word apart, per image
    hard_negative_learning_rate: float = 1e-3


def build_clip(options: ClipOptions, tokenizer: CLIPTokenizer, resolution: int) -> CLIPModel:
    """An untrained model for square images and the tokenizer's vocabulary."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": options.text_width,
        "intermediate_size": 4 * options.text_width,
        "num_hidden_layers": options.text_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,  # 2 would trigger transformers' legacy pooling
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": options.width,
        "intermediate_size": 4 * options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 4,
        "image_size": resolution,
        "patch_size": options.patch,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=options.projection))


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (B, L), padded or truncated to the context length."""
    return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def pixel_values(model: CLIPModel, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as the vision tower takes them: resized where they differ, normalised."""
    side = model.config.vision_config.image_size
    if images.shape[-2:] != (side, side):
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images - mean) / std


def image_features(model: CLIPModel, images: Tensor) -> Tensor:
    """Unit features (B, D) of images (B, 3, H, W) in [0, 1] of any size."""
    pooled = model.vision_model(pixel_values=pixel_values(model, images)).pooler_output
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)


def text_features(model: CLIPModel, ids: Tensor) -> Tensor:
    """Unit features (B, D) of token ids (B, L)."""
    # Attention is causal, so padding after the longest text changes nothing and is left out.
    longest = int((ids != model.config.text_config.eos_token_id).any(0).sum()) + 1
    pooled = model.text_model(input_ids=ids[:, :longest]).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


def contrastive_loss(
    image: Tensor, text: Tensor, positives: Tensor, log_scale: Tensor, image_to_text: float
) -> Tensor:
    """loss = w CE(image to text) + (1 - w) CE(text to image) over unit features (B, D) and (B + N, D).

    The last N texts have no image. `positives` (B, B + N) marks equal captions; those of a row have equal
    parts of its target mass.
    """
    logits = log_scale.exp() * image @ text.T
    paired = slice(0, len(image))
    # The paired part of the positives is symmetric, so that its rows serve both directions.
    targets = (positives, positives[:, paired])
    to_text, to_image = (target / target.sum(1, keepdim=True) for target in targets)
    forward, backward = F.cross_entropy(logits, to_text), F.cross_entropy(logits[:, paired].T, to_image)
    return image_to_text * forward + (1 - image_to_text) * backward


def augment(images: Tensor, generator: torch.Generator, mirror: bool) -> Tensor:
    """Affine, blur and noise augmentation: CLIP also scores reconstructions and samples, less sharp."""
    images = blur_sharpen(random_affine(images, generator, 0.5 if mirror else 0.0), generator)
    return add_noise(images, generator, 0.08).clamp(0, 1)


def train_clip(run: Run, data: CaptionedImages, tokenizer: CLIPTokenizer, options: ClipOptions) -> CLIPModel:
    """Train on a split with random captions as negatives; returns the model in evaluation mode."""
    model = build_clip(options, tokenizer, data.images.shape[-1]).to(run.device)
    distinct, caption = tokenize(tokenizer, data.texts).unique(dim=0, return_inverse=True)

    def batch(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = data.composite(index, grey_levels(len(index), run.generator))
        images = augment(images, run.generator, options.mirror)
        chosen = torch.randint(len(distinct), (options.negatives,), generator=run.generator)
        negatives = distinct[chosen].to(run.device)
        # the text tower learns from the paired captions only
        with torch.no_grad(), run.precision.autocast():
            return images, negatives, text_features(model, negatives)

    return _train(run, model, distinct[caption], options, options.learning_rate, batch)


def hard_negative_stage(
    run: Run, model: CLIPModel, data: CaptionedImages, tokenizer: CLIPTokenizer, options: ClipOptions
) -> CLIPModel:
    """Continue with captions one word apart as negatives (`HardNegatives`); gradients reach both towers.

    No image is mirrored, because a light fixed to the world distinguishes left views from right ones. Half of
    the images are not augmented at all.
    """
    model = model.to(run.device)
    distinct, caption = tokenize(tokenizer, data.texts).unique(dim=0, return_inverse=True)
    hard_negatives = HardNegatives(distinct)

    def batch(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = data.composite(index, grey_levels(len(index), run.generator))
        augmented = bernoulli_mask(images, run.generator, 0.5)
        images = torch.where(augmented, augment(images, run.generator, False), images)
        chosen = hard_negatives.sample(caption[index], options.hard_negatives, run.generator)
        negatives = distinct[chosen.flatten()].to(run.device)
        with run.precision.autocast():
            return images, negatives, text_features(model, negatives)

    return _train(run, model, distinct[caption], options, options.hard_negative_learning_rate, batch)


def _train(
    run: Run,
    model: CLIPModel,
    ids: Tensor,
    options: ClipOptions,
    learning_rate: float,
    batch: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
) -> CLIPModel:
    """The loop of both stages; `batch` returns images of rows, and negative captions with their features."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.98)
    )
    schedule = one_cycle(optimizer, run.options.steps, warmup=0.1)
    run.track(model=model, optimizer=optimizer, schedule=schedule)

    for step in run.steps():
        index = batch_indices(len(ids), options.batch, step, run.options.seed)
        images, negatives, negative_features = batch(index)
        paired = ids[index].to(run.device)
        positives = (paired[:, None] == torch.cat([paired, negatives])[None]).all(-1).float()
        with run.precision.autocast():
            text = torch.cat([text_features(model, paired), negative_features])
            image = image_features(model, images.to(run.device))

        # outside of autocast: logits of up to 100 need float32
        loss = contrastive_loss(image, text, positives, model.logit_scale, options.image_to_text)
        optimizer_step(optimizer, loss, max_norm=1.0, scaler=run.scaler)
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)  # ln 100, as in the paper; transformers does not
        run.log(loss=loss.detach())
    return model.eval()


@torch.no_grad()
def caption_features(
    model: CLIPModel, tokenizer: CLIPTokenizer, captions: Sequence[str], batch: int = 512
) -> Tensor:
    """Unit features (N, D) of captions; one longer than the context is truncated, with a warning."""
    check_length(tokenizer, captions, truncate=True)
    ids = tokenize(tokenizer, captions).to(model.device)
    return torch.cat([text_features(model, part) for part in ids.split(batch)])
