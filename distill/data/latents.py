"""Latents and conditioning of a captioned folder under a teacher, computed once and cached beside the
images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from distill.core.conditioning import Conditioning
from distill.core.teacher import Teacher
from distill.data.folders import CaptionedImages, grey_levels, load_split
from distill.data.prompts import PromptData
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path

EXTRA = "extra."  # prefix of the conditioning's further tensors in the cache file
LABEL = "label."  # prefix of what else is known of the images


@dataclass(frozen=True)
class LatentCache(PromptData):
    """All that denoiser training reads.

    latents (N, C, h, w); the conditioning of K distinct captions and, last, of the empty prompt (K + 1 rows);
    `caption` (N,), the index of each latent's caption. Those of a file stay there, in half precision: rows
    are read from it, as float32, when they are needed.
    """

    latents: Tensor
    conditioning: Conditioning
    caption: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device) -> "LatentCache":
        """The same rows on another device."""
        return LatentCache(self.latents.to(device), self.conditioning.to(device), self.caption.to(device))

    @property
    def num_captions(self) -> int:
        """K, without the empty prompt."""
        return len(self.conditioning) - 1

    @property
    def uncond(self) -> Conditioning:
        """The empty prompt's conditioning, one row."""
        return self.conditioning.select(slice(-1, None)).apply(Tensor.float)

    def conditioning_of(self, indices: Tensor, dropped: Tensor | None = None) -> Conditioning:
        """The conditioning of the latents at `indices` (B,); the empty prompt's where `dropped` (B,) is
        true.
        """
        caption = self.caption[indices]
        if dropped is not None:
            caption = torch.where(dropped, self.num_captions, caption)
        return self.conditioning.select(caption).apply(Tensor.float)

    def latents_of(self, indices: Tensor) -> Tensor:
        """As of all prompt data."""
        return self.latents[indices].float()


@torch.no_grad()
def cache_latents(
    encode_images: Callable[[Tensor], Tensor],
    data: CaptionedImages,
    captions: Sequence[str],
    conditioning: Conditioning,
    backgrounds: Tensor | None = None,
    batch: int = 64,
) -> LatentCache:
    """Encode a split once, over grey levels `backgrounds` (N,), by default fixed ones.

    `conditioning` (K + 1 rows) belongs to the K distinct `captions` and the empty prompt.
    """
    levels = (grey_levels(len(data)) if backgrounds is None else backgrounds).to(data.images.device)
    parts = tqdm(torch.arange(len(data)).split(batch), desc="latents", unit="batch", mininterval=5, delay=5)
    latents = torch.cat([encode_images(data.composite(part, levels[part])).cpu() for part in parts])
    index = {text: i for i, text in enumerate(captions)}
    return LatentCache(latents, conditioning.to("cpu"), torch.tensor([index[text] for text in data.texts]))


def load_latents(teacher: Teacher, folder: Path | str, split: str = "train") -> LatentCache:
    """The cache of a split, in float16 in `<folder>/.latents`, computed where it does not exist yet.

    Raises `UserError` for a folder that is no captioned image folder and for a damaged cache.
    """
    path = Path(folder) / ".latents" / f"{split}-{teacher.fingerprint()}.safetensors"
    if not path.is_file():
        write_cache(path, _encode_split(teacher, folder, split))
    return read_cache(path)[0]


def _encode_split(teacher: Teacher, folder: Path | str, split: str) -> LatentCache:
    data = load_split(folder, split, teacher.resolution).with_prompts(teacher.prompt_of)
    captions = sorted(set(data.texts))
    prompts = [*captions, ""]
    batches = [prompts[first : first + 256] for first in range(0, len(prompts), 256)]
    print(f"encoding {len(data)} images of {folder}/{split}, once")
    conditioning = Conditioning.cat([teacher.encode_text(batch).to("cpu") for batch in batches])
    device = teacher.device
    return cache_latents(
        lambda images: teacher.encode_images(images.to(device)), data, captions, conditioning
    )


def read_cache(path: Path) -> tuple[LatentCache, dict[str, Tensor]]:
    """What `write_cache` wrote. Raises `UserError` for a damaged file."""
    try:
        saved = load_file(path)
        extras = {name.removeprefix(EXTRA): v for name, v in saved.items() if name.startswith(EXTRA)}
        labels = {name.removeprefix(LABEL): v for name, v in saved.items() if name.startswith(LABEL)}
        cache = LatentCache(saved["latents"], Conditioning(saved["states"], extras), saved["caption"])
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, it will be computed again") from None
    return cache, labels


def write_cache(path: Path, cache: LatentCache, labels: Mapping[str, Tensor] | None = None) -> None:
    """Write a cache in half precision, with further `labels` as they are."""
    tensors = {"latents": cache.latents, "states": cache.conditioning.embedding}
    tensors |= {EXTRA + name: value for name, value in cache.conditioning.extras.items()}
    halves = {name: value.half().contiguous() for name, value in tensors.items()}
    exact = {LABEL + name: value.contiguous() for name, value in (labels or {}).items()}
    with atomic_path(path) as temporary:
        save_file({**halves, **exact, "caption": cache.caption}, temporary)
