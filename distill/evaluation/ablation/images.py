"""What the bench of losses tells of pictures: by CLIP, by the judge, by their spread and saturation; and images as its subject."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel

from distill.apps.optimise_image import OptimiseImage, OptimiseImageOptions, diversity, saturation
from distill.evaluation.ablation.plan import Cell, Figures
from distill.evaluation.judge import Judge, predict
from distill.runtime.images import image_grid, save_png
from distill.runtime.run import Run, RunOptions
from distill.teacher.clip import caption_features, image_features
from distill.teacher.latent import Teacher


@dataclass(frozen=True)
class Graders:
    """Who grades pictures: the teacher's own CLIP (also part of what made them) and the independent judge."""

    clip: CLIPModel
    judge: Judge


def wanted(prompt: str, judge: Judge) -> dict[str, str]:
    """What a prompt of the world asks for, by the judge's attributes: its words that are labels."""
    words = prompt.replace(",", " ").split()
    return {name: word for name, labels in judge.labels.items() for word in words if word in labels}


@torch.no_grad()
def grade(images: Tensor, prompts: Sequence[str], teacher: Teacher, graders: Graders) -> Figures:
    """Mean CLIP cosine of images (N, 3, H, W) with their prompts; shares the judge tells right; saturation."""
    text = caption_features(graders.clip, teacher.tokenizer, prompts)
    told = predict(graders.judge, images)
    right = {name: [] for name in ("object", "colour")}  # type: dict[str, list[float]]
    for index, prompt in enumerate(prompts):
        asked = wanted(prompt, graders.judge)
        for name in right:
            if name in asked:
                right[name].append(float(told[name][index] == asked[name]))
    shares = {f"judge_{name}": sum(values) / len(values) for name, values in right.items() if values}
    return {
        "clip_score": float((image_features(graders.clip, images) * text).sum(1).mean()),
        **shares,
        "saturation": float(saturation(images).mean()),
    }


def run_images(cell: Cell, teacher: Teacher, graders: Graders, options: OptimiseImageOptions) -> Figures:
    """Particles driven by the cell's loss, in the cell's directory, graded."""
    run_options = RunOptions(
        str(cell.directory), cell.steps, cell.seed, trackers=(), preview_every=10**9, checkpoint_every=10**9
    )
    run = Run(run_options, {"prompt": cell.prompt, "loss": cell.loss}, cell.loss)
    task = OptimiseImage(run, teacher, cell.objective, replace(options, prompt=cell.prompt))
    images = task.train()
    seconds = run.seconds
    save_png(picture(cell), image_grid(images, min(len(images), 8)))
    figures = {
        **grade(images, [cell.prompt] * len(images), teacher, graders),
        "diversity": diversity(images),
        "seconds": seconds,
    }
    run.finish(figures)
    return figures


def picture(cell: Cell) -> Path:
    """Where a cell's picture lies."""
    return cell.directory / "images.png"
