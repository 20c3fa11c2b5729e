"""The latents and text states of a captioned folder under a teacher, computed once and kept beside the images."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from distill.checkpoint import fingerprint
from distill.data import atomic_path, load_split
from distill.errors import UserError
from distill.teacher.frozen import Teacher
from distill.teacher.unet import LatentCache, cache_latents


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
    parts = [teacher.encode_text(part).cpu() for part in ([*texts, ""][i : i + 256] for i in range(0, len(texts) + 1, 256))]
    print(f"encoding {len(data)} images of {folder}/{split}, once")
    made = cache_latents(teacher.vae, data, texts, torch.cat(parts))
    saved = {"latents": made.latents.half().contiguous(), "states": made.states.half().contiguous(), "caption": made.caption}
    with atomic_path(path) as temporary:
        save_file(saved, temporary)
    return LatentCache(saved["latents"].float(), saved["states"].float(), saved["caption"])
