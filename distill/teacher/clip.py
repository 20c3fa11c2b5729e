"""A small CLIP (Radford et al. 2021, arXiv:2103.00020): `transformers.CLIPModel` trained on a captioned folder."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from distill.data import Captioned, grey_levels
from distill.run import Run, batches

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
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=normalise(images)).pooler_output), dim=-1)


def text_features(model: CLIPModel, ids: Tensor) -> Tensor:
    """Unit features (B, D) of token ids (B, L)."""
    return F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output), dim=-1)


def contrastive_loss(image: Tensor, text: Tensor, same: Tensor, log_scale: Tensor, image_to_text: float) -> Tensor:
    """Weighted symmetric cross-entropy over unit features (B, D); `same` (B, B) marks equal captions, all of them positives.

    loss = w CE(image to text) + (1 - w) CE(text to image), with the positives of a row sharing its target mass equally.
    """
    logits = log_scale.exp() * image @ text.T
    target = same / same.sum(1, keepdim=True)  # `same` is symmetric, and so are both directions' targets
    return image_to_text * F.cross_entropy(logits, target) + (1 - image_to_text) * F.cross_entropy(logits.T, target)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur or noise a part of the images, so that CLIP is a fair judge of reconstructions and samples too."""
    kind = torch.rand(len(images), 1, 1, 1, generator=generator)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noisy = images + torch.randn(images.shape, generator=generator) * torch.rand(len(images), 1, 1, 1, generator=generator) * 0.1
    return torch.where(kind < 0.25, soft, torch.where(kind < 0.5, noisy, images))


def train_clip(run: Run, data: Captioned, tokenizer: CLIPTokenizer, options: ClipOptions) -> CLIPModel:
    """Train on a split; returns the model in evaluation mode."""
    resolution = data.images.shape[-1]
    model = build_clip(options, tokenizer, resolution).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.98))
    steps = run.options.steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=steps, pct_start=0.1)
    run.track(model=model, optimizer=optimizer, schedule=schedule)
    ids = tokenize(tokenizer, data.texts)
    for step in run.steps():
        index = batches(len(data), options.batch, step, run.options.seed)
        images = augment(data.composite(index, grey_levels(len(index), run.generator)), run.generator).to(run.device)
        words = ids[index].to(run.device)
        same = (words[:, None] == words[None]).all(-1).float()
        features = image_features(model, images), text_features(model, words)
        loss = contrastive_loss(*features, same, model.logit_scale, options.image_to_text)
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
def classify(model: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, prompts: Sequence[str], batch: int = 250) -> Tensor:
    """Zero-shot: for each image (N, 3, H, W) the index (N,) of the prompt nearest to it."""
    device = model.logit_scale.device
    text = text_features(model, tokenize(tokenizer, prompts).to(device))
    return torch.cat([(image_features(model, chunk.to(device)) @ text.T).argmax(1).cpu() for chunk in images.split(batch)])
