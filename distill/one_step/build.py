"""A distillation put together from names: teacher, data, judge; what the script calls."""

from collections.abc import Callable

import torch
from torch import Tensor

from distill.apps.optimise_image import saturation
from distill.data.latents import LatentCache, load_latents
from distill.evaluation.judge import Judge, judge_features
from distill.evaluation.metrics import moments
from distill.one_step.monitor import Monitor, MonitorOptions
from distill.one_step.regression import Regression, RegressionOptions, load_pairs
from distill.one_step.trainer import OneStep, OneStepOptions
from distill.runtime.run import Run
from distill.teacher.latent import Teacher


def decoder(teacher: Teacher) -> Callable[[Tensor], Tensor]:
    """Latents (N, C, h, w) to images (N, 3, H, W) on the CPU, in parts, without gradient."""

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return torch.cat([teacher.decode(part.to(teacher.device)).cpu() for part in latents.split(64)])

    return decode


def image_monitor(
    teacher: Teacher, judge: Judge, cache: LatentCache, options: MonitorOptions, count: int = 2000
) -> Monitor:
    """Watches decoded samples in the judge's features against `count` decoded real latents."""
    decode = decoder(teacher)
    real = decode(cache.latents[torch.arange(count) * len(cache.latents) // count])
    level = float(saturation(real).mean())
    return Monitor(
        moments(judge_features(judge, real)),
        decode,
        lambda images: judge_features(judge, images),
        lambda images: float(saturation(images).mean()) / level,
        options,
        {},
    )


def make_regression(teacher: Teacher, judge: Judge, options: RegressionOptions | None) -> Regression | None:
    """The regression of its options on pairs made before; in the judge's features where they ask for those."""
    if options is None:
        return None
    return Regression(load_pairs(options.pairs, teacher.encode_text), options, teacher.decode, judge.layers)


def start(run: Run, teacher: Teacher, judge: Judge, data: str, options: OneStepOptions) -> OneStep:
    """Everything loaded and made; `train` of what is returned runs it. Raises `UserError` for data or pairs that cannot serve."""
    cache = load_latents(teacher, data)
    regression = make_regression(teacher, judge, options.method.regression)
    return OneStep(
        run,
        teacher,
        cache,
        options,
        image_monitor(teacher, judge, cache, options.monitor),
        regression,
        decoder(teacher),
    )
