"""The same prompts and noise by several samplers, timed, or by several formulations of one ODE."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from distill.apps.text_to_image import TextToImageOptions, initial_batch, text_to_image
from distill.core.samplers import parse_sampler
from distill.core.sampling import Formulation, sample_heun
from distill.core.score import Guided
from distill.core.teacher import Teacher


def compare_samplers(
    teacher: Teacher, options: TextToImageOptions, samplers: Sequence[str]
) -> tuple[list[Tensor], str]:
    """The options' images by each sampler (`parse_sampler`) from the same noise, and a table of times.

    Each sampler runs once before it is timed. Raises `UserError` for more steps than the schedule has.
    """
    images, lines = [], [f"{'sampler':9} {'steps':>6} {'NFE':>6} {'ms an image':>12}"]
    for text in samplers:
        name, steps = parse_sampler(text, options.steps)
        chosen = replace(options, sampler=name, steps=steps)
        text_to_image(teacher, replace(chosen, steps=min(2, steps), strength=1.0))
        start = time.perf_counter()
        images.append(text_to_image(teacher, chosen).images)
        milliseconds = 1e3 * (time.perf_counter() - start) / len(images[-1])
        lines.append(f"{name:9} {steps:6} {chosen.nfe:6} {milliseconds:12.1f}")
    return images, "\n".join(lines)


@torch.no_grad()
def compare_formulations(
    teacher: Teacher, options: TextToImageOptions, formulations: Sequence[Formulation]
) -> tuple[list[Tensor], str]:
    """The options' images by Heun's method in each formulation (`sample_heun`) from the same noise.

    The table holds RMSE and PSNR between the images of each two: they agree up to discretisation.
    """
    conditioning, noise = initial_batch(teacher, options)
    model = Guided(teacher, teacher.encode_text([options.negative_prompt]), options.guidance)
    images = {}
    for formulation in formulations:
        latents = sample_heun(model, conditioning, noise, options.steps, formulation)
        images[formulation] = teacher.decode(latents).cpu()

    lines = [f"Heun's method, {options.steps} steps, {2 * options.nfe} NFE an image"]
    lines += [f"{'formulations':14} {'RMSE':>8} {'PSNR (dB)':>10}"]
    for a, b in combinations(images, 2):
        rmse = float((images[a] - images[b]).square().mean().sqrt())
        psnr = -20 * math.log10(rmse) if rmse else math.inf
        lines.append(f"{f'{a}, {b}':14} {rmse:8.4f} {psnr:10.1f}")
    return list(images.values()), "\n".join(lines)
