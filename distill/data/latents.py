"""The latents and text states of a captioned folder under a teacher, computed once and kept beside the images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.data.folders import CaptionedImages, load_split
from distill.runtime.checkpoint import fingerprint
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path
from distill.teacher.latent import Teacher


@dataclass(frozen=True)
class LatentCache:
    """All that U-Net training reads: latents (N, C, h, w), text states (K, L, D) of the K captions, `caption` (N,) their index.

    The last text state is the empty prompt's.
    """

    latents: Tensor
    states: Tensor
    caption: Tensor


@torch.no_grad()
def cache_latents(
    vae: AutoencoderKL, data: CaptionedImages, texts: Sequence[str], states: Tensor, batch: int = 64
) -> LatentCache:
    """Encode a split once; `states` (K + 1, L, D) belong to the K distinct `texts` and the empty prompt."""
    device = next(vae.parameters()).device
    parts = torch.arange(len(data)).split(batch)
    latents = [vae.encode(data.composite(part).to(device) * 2 - 1).latent_dist.mean.cpu() for part in parts]
    place = {text: index for index, text in enumerate(texts)}
    caption = torch.tensor([place[text] for text in data.texts])
    return LatentCache(torch.cat(latents) * vae.config.scaling_factor, states.cpu(), caption)


def load_latents(teacher: Teacher, folder: Path | str, split: str = "train") -> LatentCache:
    """Of a split of a captioned folder, in float16 on the disk (`<folder>/.latents`), made where it is not there yet.

    Raises `UserError` for a folder that cannot serve.
    """
    path = Path(folder) / ".latents" / f"{split}-{fingerprint(teacher.vae, teacher.text_encoder)}.safetensors"
    if path.is_file():
        try:
            saved = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): delete it, it will be made again") from None
        return LatentCache(saved["latents"].float(), saved["states"].float(), saved["caption"])
    data = load_split(folder, split, teacher.resolution)
    texts = sorted(set(data.texts))
    parts = [
        teacher.encode_text(part).cpu()
        for part in ([*texts, ""][i : i + 256] for i in range(0, len(texts) + 1, 256))
    ]
    print(f"encoding {len(data)} images of {folder}/{split}, once")
    made = cache_latents(teacher.vae, data, texts, torch.cat(parts))
    saved = {
        "latents": made.latents.half().contiguous(),
        "states": made.states.half().contiguous(),
        "caption": made.caption,
    }
    with atomic_path(path) as temporary:
        save_file(saved, temporary)
    return LatentCache(saved["latents"].float(), saved["states"].float(), saved["caption"])
