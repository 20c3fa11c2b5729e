"""What the U-Net is trained on, encoded once by the finished CLIP and VAE and kept beside the images."""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from distill.core.conditioning import Conditioning
from distill.data.folders import CaptionedImages, grey_levels, load_split
from distill.data.latents import LatentCache, cache_latents, read_cache, write_cache
from distill.data.views import ViewLabels, group_backgrounds, group_size_of, has_views, label_views
from distill.runtime.checkpoint import fingerprint
from distill.teacher.clip import image_features, tokenize
from distill.teacher.folder import TeacherParts


def load_training_cache(
    parts: TeacherParts, folder: Path | str, resolution: int
) -> tuple[LatentCache, ViewLabels | None]:
    """Latents and text embeddings of the training split; view labels where its rows have poses and groups.

    They are computed where the file `<folder>/.latents/unet-train-*.safetensors` does not exist yet. Raises
    `UserError` for data that cannot be read.
    """
    digest = fingerprint(parts.clip, parts.vae)
    path = Path(folder) / ".latents" / f"unet-train-{digest}.safetensors"
    if not path.is_file():
        data = load_split(folder, "train", resolution)
        print(f"encoding {len(data)} images of {folder}/train, once")
        cache, labels = encode_split(parts, data)
        write_cache(path, cache, {} if labels is None else _tensors(labels))
    cache, tensors = read_cache(path)
    return cache, _labels(tensors) if tensors else None


@torch.no_grad()
def encode_split(parts: TeacherParts, data: CaptionedImages) -> tuple[LatentCache, ViewLabels | None]:
    """Latents of a split, the text embeddings of its distinct captions and of the empty one, view labels."""
    clip, vae = parts.clip, parts.vae
    captions = sorted(set(data.texts))
    ids = tokenize(parts.tokenizer, [*captions, ""]).to(clip.device)
    embeddings = torch.cat([clip.text_model(input_ids=part).last_hidden_state for part in ids.split(512)])

    def encode(images: Tensor) -> Tensor:
        return vae.encode(images.to(vae.device) * 2 - 1).latent_dist.mean * vae.config.scaling_factor

    if not has_views(data):
        return cache_latents(encode, data, captions, Conditioning(embeddings), grey_levels(len(data))), None
    levels = group_backgrounds(len(data), group_size_of(data)).to(data.images.device)
    cache = cache_latents(encode, data, captions, Conditioning(embeddings), levels)
    pieces = tqdm(torch.arange(len(data)).split(256), desc="pictures", unit="batch", mininterval=5, delay=5)
    pictures = (data.composite(piece, levels[piece]).to(clip.device) for piece in pieces)
    embedding = torch.cat([image_features(clip, images).cpu() for images in pictures])
    return cache, label_views(data, embedding)


def _tensors(labels: ViewLabels) -> dict[str, Tensor]:
    embedding = labels.image_embedding.half()
    return {**vars(labels), "image_embedding": embedding, "group_size": torch.tensor(labels.group_size)}


def _labels(tensors: dict[str, Tensor]) -> ViewLabels:
    poses, embedding, has_caption = (tensors[name] for name in ("poses", "image_embedding", "has_caption"))
    return ViewLabels(poses, embedding, has_caption, int(tensors["group_size"]))
