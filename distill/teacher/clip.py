"""A small CLIP (Radford et al. 2021, arXiv:2103.00020): `transformers.CLIPModel` trained on a captioned folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from distill.data.augmentation import add_noise, move, soften, some
from distill.data.folders import CaptionedImages, batches, grey_levels
from distill.runtime.run import Run
from distill.teacher.hard_negatives import HardNegatives

MEAN = (0.5, 0.5, 0.5)  # pixel normalisation, in the image processor's files too
STD = (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class ClipOptions:
    """Size and training of CLIP. `image_to_text` is the weight of that direction, 1 minus it of the other."""

    width: int = 128
    layers: int = 4
    patch: int = 8
    text_width: int = 96
    text_layers: int = 3
    projection: int = 96
    batch: int = 96
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    image_to_text: float = 0.5
    negatives: int = 256  # further random captions each image is told from in a step
    mirror: bool = (
        True  # half of the images mirrored in the first part; false where captions say left or right
    )
    hard_negatives: int = 4  # in the second part: captions one word apart, for each image
    hard_learning_rate: float = 1e-3


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
    """Token ids (B, L), padded to the model's length."""
    return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def normalise(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as the vision tower takes them."""
    mean, std = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images - mean) / std


def image_features(model: CLIPModel, images: Tensor) -> Tensor:
    """Unit features (B, D) of images (B, 3, H, W) in [0, 1] at the model's resolution."""
    return F.normalize(
        model.visual_projection(model.vision_model(pixel_values=normalise(images)).pooler_output), dim=-1
    )


def text_features(model: CLIPModel, ids: Tensor) -> Tensor:
    """Unit features (B, D) of token ids (B, L); padding after the longest is left out, as no word looks ahead."""
    longest = int((ids != model.config.text_config.eos_token_id).any(0).sum()) + 1
    ids = ids[:, :longest]
    return F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output), dim=-1)


def contrastive_loss(
    image: Tensor, text: Tensor, same: Tensor, log_scale: Tensor, image_to_text: float
) -> Tensor:
    """Weighted symmetric cross-entropy over unit features (B, D) and (B + N, D), the last N texts without an image.

    `same` (B, B + N) marks equal captions, all of them positives.
    loss = w CE(image to text) + (1 - w) CE(text to image), with the positives of a row sharing its target mass equally.
    """
    logits = log_scale.exp() * image @ text.T
    paired = slice(0, len(image))
    forward, backward = (
        target / target.sum(1, keepdim=True) for target in (same, same[:, paired])
    )  # the paired part is symmetric
    return image_to_text * F.cross_entropy(logits, forward) + (1 - image_to_text) * F.cross_entropy(
        logits[:, paired].T, backward
    )


def augment(images: Tensor, generator: torch.Generator, mirror: bool) -> Tensor:
    """Moved, mirrored, softened or made noisy, so that CLIP is a fair judge of reconstructions and samples too."""
    images = soften(move(images, generator, 0.5 if mirror else 0.0), generator)
    return add_noise(images, generator, 0.08).clamp(0, 1)


def train_clip(run: Run, data: CaptionedImages, tokenizer: CLIPTokenizer, options: ClipOptions) -> CLIPModel:
    """Train on a split, each image told from random captions; returns the model in evaluation mode."""
    model = build_clip(options, tokenizer, data.images.shape[-1]).to(run.device)
    distinct, caption = tokenize(tokenizer, data.texts).unique(dim=0, return_inverse=True)

    def batch(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = augment(
            data.composite(index, grey_levels(len(index), run.generator)), run.generator, options.mirror
        )
        others = distinct[torch.randint(len(distinct), (options.negatives,), generator=run.generator)].to(
            run.device
        )
        with torch.no_grad():  # they are targets to be told from; texts learn from the paired part
            return images, others, text_features(model, others)

    return _train(run, model, distinct[caption], options, options.learning_rate, batch)


def hard_negative_stage(
    run: Run, model: CLIPModel, data: CaptionedImages, tokenizer: CLIPTokenizer, options: ClipOptions
) -> CLIPModel:
    """Train on, each image told from captions one word apart (`HardNegatives`), both towers learning from them.

    Nothing is mirrored: the light that is fixed to the world tells one view from another. Half of the images stay as they are.
    """
    model = model.to(run.device)
    distinct, caption = tokenize(tokenizer, data.texts).unique(dim=0, return_inverse=True)
    neighbours = HardNegatives(distinct)

    def batch(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = data.composite(index, grey_levels(len(index), run.generator))
        images = torch.where(some(images, run.generator, 0.5), augment(images, run.generator, False), images)
        others = distinct[
            neighbours.draw(caption[index], options.hard_negatives, run.generator).flatten()
        ].to(run.device)
        return images, others, text_features(model, others)

    return _train(run, model, distinct[caption], options, options.hard_learning_rate, batch)


def _train(
    run: Run,
    model: CLIPModel,
    ids: Tensor,
    options: ClipOptions,
    rate: float,
    batch: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
) -> CLIPModel:
    """The loop: `batch` gives the images of rows, and further captions with their features."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, weight_decay=options.weight_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=run.options.steps, pct_start=0.1
    )
    run.track(model=model, optimizer=optimizer, schedule=schedule)
    for step in run.steps():
        index = batches(len(ids), options.batch, step, run.options.seed)
        images, others, far = batch(index)
        words = ids[index].to(run.device)
        same = (words[:, None] == torch.cat([words, others])[None]).all(-1).float()
        text = torch.cat([text_features(model, words), far])
        loss = contrastive_loss(
            image_features(model, images.to(run.device)), text, same, model.logit_scale, options.image_to_text
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)  # ln 100, as in the paper; transformers does not
        run.log(loss=loss.detach())
    return model.eval()


@torch.no_grad()
def caption_features(
    model: CLIPModel, tokenizer: CLIPTokenizer, captions: Sequence[str], batch: int = 512
) -> Tensor:
    """Unit features (N, D) of captions."""
    ids = tokenize(tokenizer, captions).to(model.device)
    return torch.cat([text_features(model, part) for part in ids.split(batch)])


@torch.no_grad()
def label_shares(
    model: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, labels: Sequence[str], batch: int = 250
) -> Tensor:
    """Shares (N, K) of K labels for images (N, 3, H, W) in [0, 1]: softmax of scaled cosines (arXiv:2103.00020, section 3.1)."""
    text = caption_features(model, tokenizer, labels)
    parts = [image_features(model, part.to(model.device)) @ text.T for part in images.split(batch)]
    return (model.logit_scale.exp() * torch.cat(parts)).softmax(1).cpu()
