"""Training of an upscaler on images of the large size, and its figures beside bicubic interpolation."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.data.folders import CaptionedImages, batch_indices, grey_levels
from distill.evaluation.judge import Judge, load_judge
from distill.runtime.errors import UserError
from distill.runtime.optim import one_cycle, optimizer_step
from distill.runtime.run import Run
from distill.teacher.vae import psnr
from distill.upscaler.network import Upscaler, UpscalerOptions, bicubic, upscale


def random_crops(images: Tensor, indices: Tensor, side: int, multiple: int, key: Sequence[int]) -> Tensor:
    """Crops (B, C, side, side) of images (N, C, H, W), half of them mirrored; a function of the key alone.

    Their corners are at multiples of `multiple`, where the pixels of the small images begin.
    """
    rng = np.random.default_rng(key)
    corners = [(size - side) // multiple + 1 for size in images.shape[-2:]]
    crops = []
    for index in indices.tolist():
        top, left = (multiple * int(rng.integers(count)) for count in corners)
        crop = images[index, :, top : top + side, left : left + side]
        crops.append(crop.flip(-1) if rng.random() < 0.5 else crop)
    return torch.stack(crops)


def downscale(images: Tensor, scale: int) -> Tensor:
    """Images (B, 3, H, W) averaged over areas of scale x scale pixels."""
    return F.avg_pool2d(images, scale)


def train_upscaler(run: Run, data: CaptionedImages, options: UpscalerOptions) -> Upscaler:
    """Train on crops of a split over random grey levels; the result is in evaluation mode, as it is saved.

    Raises `UserError` for images that are smaller than a crop.
    """
    side = options.patch * options.scale
    if min(data.images.shape[-2:]) < side:
        raise UserError(
            f"images of {data.images.shape[-1]} pixels are smaller than crops of {side}, patch times the "
            "scale: give upscaler.patch, or larger images"
        )
    upscaler = Upscaler(options).to(run.device)
    judge = load_judge(options.perceptual_judge, run.device) if options.perceptual_weight else None
    optimizer = torch.optim.AdamW(upscaler.parameters(), lr=options.learning_rate, weight_decay=0.0)
    schedule = one_cycle(optimizer, run.options.steps, warmup=0.05)
    run.track(model=upscaler, optimizer=optimizer, schedule=schedule)
    device, generator = run.data_device(data.images.nbytes)
    data = data.to(device)
    for step in run.steps():
        index = batch_indices(len(data), options.batch, step, run.options.seed)
        key = run.options.seed, step
        crops = random_crops(data.images, index, side, options.scale, key)
        rows = CaptionedImages(crops, [{}] * len(crops))
        large = rows.composite(slice(None), grey_levels(len(crops), generator)).to(run.device)
        small = downscale(large, options.scale)
        noise = torch.randn(small.shape, generator=generator, device=generator.device).to(run.device)
        with run.precision.autocast():
            output = upscaler(small + options.input_noise * noise)
        mse = F.mse_loss(output, large)
        loss = mse if options.loss == "mse" else F.l1_loss(output, large)
        if judge is not None:
            loss = loss + options.perceptual_weight * perceptual_distance(judge, output, large)
        optimizer_step(optimizer, loss, max_norm=1.0, scaler=run.scaler)
        schedule.step()
        run.log(loss=loss.detach(), psnr=psnr(mse.detach()))
        if run.due(run.options.preview_every):
            rows_of_preview = [bicubic(small, side), output.detach(), large]
            run.preview("crops", torch.cat(rows_of_preview).clamp(0, 1))
    return upscaler.half().float().eval().requires_grad_(False)


def perceptual_distance(judge: Judge, images: Tensor, target: Tensor) -> Tensor:
    """The mean squared difference of a judge's layers of two sets of images (B, 3, H, W) in [0, 1].

    As the loss on VGG's features in the paper (section 2.2.1).
    """
    pairs = zip(judge.layers(images), judge.layers(target), strict=True)
    return torch.stack([F.mse_loss(a, b) for a, b in pairs]).mean()


@torch.no_grad()
def upscaler_figures(upscaler: Upscaler, data: CaptionedImages, sides: tuple[int, ...]) -> dict[str, float]:
    """PSNR in dB and SSIM at each side, by the upscaler and by bicubic interpolation, mean over the images.

    The small images are those of a split, of `side / scale` pixels at the largest side. SSIM is that of
    Wang et al. 2004 with its Gaussian window (scikit-image).
    """
    figures: dict[str, list[float]] = {}
    for indices in torch.arange(len(data)).split(8):
        images = data.composite(indices)
        small = downscale(images, upscaler.options.scale)
        for side in sides:
            target = F.interpolate(images, (side, side), mode="area")
            outputs = {
                "upscaler": upscale(upscaler, small, side),
                "bicubic": bicubic(small, side).clamp(0, 1),
            }
            for name, output in outputs.items():
                errors = (output - target).square().flatten(1).mean(1)
                figures.setdefault(f"{name}_psnr_{side}", []).extend(psnr(errors).tolist())
                figures.setdefault(f"{name}_ssim_{side}", []).extend(
                    ssim(a, b) for a, b in zip(output, target, strict=True)
                )
    return {name: float(np.mean(values)) for name, values in figures.items()}


def ssim(image: Tensor, target: Tensor) -> float:
    """Structural similarity of two images (3, H, W) in [0, 1]."""
    from skimage.metrics import structural_similarity

    a, b = (value.permute(1, 2, 0).cpu().numpy() for value in (image, target))
    return float(
        structural_similarity(
            a,
            b,
            channel_axis=2,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )
