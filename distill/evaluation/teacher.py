"""How good a teacher is, on held-out images and captions, graded by an independent judge."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.data.folders import CaptionedImages
from distill.evaluation.judge import Judge, judge_features, predict
from distill.evaluation.metrics import frechet_distance, moments
from distill.runtime.errors import UserError
from distill.teacher.clip import caption_features, image_features
from distill.teacher.folder import load_clip
from distill.teacher.latent import Teacher
from distill.teacher.vae import psnr, reconstruct
from distill.teacher.vocabulary import phrase


@dataclass(frozen=True)
class EvaluationOptions:
    """What is sampled: `samples` captions at each guidance scale, by DDIM in `steps` steps."""

    samples: int = 500
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 7.5)
    steps: int = 25
    seed: int = 0
    batch: int = 50

    def __post_init__(self) -> None:
        if min(self.samples, self.steps, self.batch) < 1 or not self.guidance:
            raise UserError("samples, steps and batch must be positive and guidance needs at least one scale")


def evaluate_teacher(
    teacher: Teacher, judge: Judge, data: CaptionedImages, options: EvaluationOptions
) -> tuple[dict[str, Any], Tensor]:
    """All figures of a teacher on a test split with object and colour columns, and samples (S, 3, H, W) at the best guidance."""
    single = data.select([i for i, row in enumerate(data.rows) if not row.get("relation")])
    if len(single) < 2:
        raise UserError(
            "the test split has no rows with one object: the evaluation needs object and colour columns"
        )
    images = single.composite(slice(None))
    restored = reconstruct(teacher.vae, images)
    error = (restored - images).square()
    figures: dict[str, Any] = {
        "clip": zero_shot(teacher, single, images),
        "vae": {
            "psnr": float(psnr(error.mean())),
            "psnr_mean_over_images": float(psnr(error.flatten(1).mean(1)).mean()),
        },
        "judge_on": {
            "real": graded(judge, images, single.rows),
            "reconstructions": graded(judge, restored, single.rows),
        },
    }
    real = judge_features(judge, images)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    halves = [moments(real[part]) for part in order.chunk(2)]
    whole = moments(real)
    count = min(options.samples, len(single))
    chosen = single.select(range(count))
    figures["frechet"] = {
        "real_halves": frechet_distance(*halves),
        "reconstructions": frechet_distance(moments(judge_features(judge, restored)), whole),
    }
    best, shown = -1.0, images[:0]
    figures["samples"] = []
    for scale in options.guidance:
        drawn = draw(teacher, chosen.texts, scale, options)
        row = {"guidance": scale, **graded(judge, drawn, chosen.rows)}
        row["frechet"] = frechet_distance(moments(judge_features(judge, drawn)), whole)
        figures["samples"].append(row)
        if row["object_and_colour"] > best:
            best, shown = row["object_and_colour"], drawn
    return figures, shown


def draw(teacher: Teacher, captions: Sequence[str], scale: float, options: EvaluationOptions) -> Tensor:
    """Images (N, 3, H, W) of captions, the noise of each a function of the seed and its place only."""
    generator = torch.Generator().manual_seed(options.seed)
    noise = torch.randn(len(captions), *teacher.latent_shape, generator=generator)
    model = Guided(teacher, teacher.encode_text([""]), scale)
    parts = []
    for part in torch.arange(len(captions)).split(options.batch):
        states = teacher.encode_text([captions[i] for i in part])
        latents = sample_ode(model, teacher.scheduler, states, noise[part].to(teacher.device), options.steps)
        parts.append(teacher.decode(latents).cpu())
    return torch.cat(parts)


def graded(judge: Judge, images: Tensor, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shares of images in which the judge sees what the rows say; view only where the caption names one and the object has a front."""
    told = predict(judge, images)
    right = {
        k: [p == row[k] for p, row in zip(told[k], rows, strict=True)] for k in ("object", "colour", "view")
    }
    both = [a and b for a, b in zip(right["object"], right["colour"], strict=True)]
    named = [
        r
        for r, row in zip(right["view"], rows, strict=True)
        if row["has_front"] and row["view"] and row["view"] in row["text"]
    ]
    unseen = [r for r, row in zip(both, rows, strict=True) if row["held_out"]]
    lists = {
        "object": right["object"],
        "colour": right["colour"],
        "object_and_colour": both,
        "view": named,
        "held_out_combinations": unseen,
    }
    return {name: _share(values) for name, values in lists.items()}


@torch.no_grad()
def zero_shot(teacher: Teacher, data: CaptionedImages, images: Tensor) -> dict[str, float]:
    """CLIP's zero-shot accuracy over all pairs of object and colour, of the view given the pair, and text retrieval among captions.

    A pair's class is the mean over its captions without a view and with each (prompt ensembling, arXiv:2103.00020, section 3.1.4).
    """
    clip = load_clip(Path(teacher.place))
    rows = data.rows
    pairs = sorted({(row["colour"], row["object"]) for row in rows})
    views = sorted({row["view"] for row in rows if row["view"]})
    endings = ["", *(f", {view} view" for view in views)]
    prompts = [phrase(*pair) + ending for pair in pairs for ending in endings]
    features = torch.cat([image_features(clip, part) for part in images.split(250)])
    table = caption_features(clip, teacher.tokenizer, prompts).unflatten(0, (len(pairs), len(endings)))
    told = [pairs[i] for i in (features @ table.mean(1).T).argmax(1).tolist()]
    place = [pairs.index((row["colour"], row["object"])) for row in rows]
    turned = torch.einsum("nd,nvd->nv", features, table[place, 1:]).argmax(1).tolist()
    texts = sorted(set(data.texts))
    nearest = (features @ caption_features(clip, teacher.tokenizer, texts).T).argmax(1).tolist()
    return {
        "object": _share(pair[1] == row["object"] for pair, row in zip(told, rows, strict=True)),
        "colour": _share(pair[0] == row["colour"] for pair, row in zip(told, rows, strict=True)),
        "view_with_a_front": _share(
            views[turn] == row["view"]
            for turn, row in zip(turned, rows, strict=True)
            if row["has_front"] and row["view"]
        ),
        "retrieval_top1": _share(texts[n] == row["text"] for n, row in zip(nearest, rows, strict=True)),
        "retrieval_captions": float(len(texts)),
    }


def _share(hits: Iterable[bool]) -> float:
    values = list(hits)
    return sum(values) / max(len(values), 1)
