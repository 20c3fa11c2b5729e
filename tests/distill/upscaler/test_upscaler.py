"""The upscaler: its start, what it learns, its files, and its use by the scripts' options."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import script
from PIL import Image
from torch.nn import functional as F

from distill.data.folders import CaptionedImages
from distill.evaluation.judge import load_judge
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.upscaler.network import Upscaler, UpscalerOptions, bicubic, load_upscaler, save_upscaler, upscale
from distill.upscaler.train import (
    downscale,
    perceptual_distance,
    random_crops,
    ssim,
    train_upscaler,
    upscaler_figures,
)
from sds3d.export.export import ExportOptions, enlargement
from sds3d.scene.cameras import ring
from sds3d.world.raycast import RayCaster, render
from sds3d.world.shapes import make_shape

SMALL = UpscalerOptions(width=16, blocks=1, stages=(16, 8), patch=8, batch=8, learning_rate=5e-3)


def bars(count: int, side: int = 64) -> CaptionedImages:
    """Images with one sharp vertical edge each, at any position: interpolation blurs it."""
    edges = torch.randint(8, side - 8, (count,), generator=torch.Generator().manual_seed(0))
    dark = torch.arange(side) < edges[:, None]
    images = torch.where(dark[:, None, None], 40, 220).expand(-1, 3, side, -1).to(torch.uint8)
    return CaptionedImages(images.contiguous(), [{"text": "a bar"}] * count)


def random_images(count: int, side: int) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_it_starts_as_bicubic_interpolation() -> None:
    images = random_images(2, 8)
    torch.testing.assert_close(Upscaler(SMALL)(images), bicubic(images, 32))
    assert SMALL.scale == 4 and UpscalerOptions().scale == 8


def test_training_sharpens_edges_beyond_interpolation(tmp_path: Path) -> None:
    run = Run(RunOptions(str(tmp_path), 400, trackers=()), {}, "upscaler")
    upscaler = train_upscaler(run, bars(64), SMALL)
    figures = upscaler_figures(upscaler, bars(8), (64, 32))
    for side in (64, 32):
        assert figures[f"upscaler_psnr_{side}"] > figures[f"bicubic_psnr_{side}"] + 2, figures
        assert figures[f"upscaler_ssim_{side}"] > figures[f"bicubic_ssim_{side}"], figures


def test_a_perceptual_loss_is_zero_for_the_same_images_only() -> None:
    judge, images = load_judge("judge64"), random_images(2, 64)
    assert float(perceptual_distance(judge, images, images)) == 0
    assert float(perceptual_distance(judge, images, images.flip(-1))) > 0


def test_crops_are_parts_of_the_images_on_the_grid_of_small_pixels() -> None:
    """So that the small image of a crop is a crop of the small image; half are mirrored."""
    images = random_images(3, 64)
    crops = random_crops(images, torch.tensor([2, 0, 1, 1]), 16, 4, (0, 5))
    small, mirrored = downscale(images, 4), 0
    for crop, index in zip(crops, (2, 0, 1, 1), strict=True):
        patches = F.unfold(small[index : index + 1], 4)[0].T
        plain, flipped = (downscale(value[None], 4).flatten() for value in (crop, crop.flip(-1)))
        hits = [bool((patches - value).abs().amax(1).min() < 1e-6) for value in (plain, flipped)]
        assert any(hits)
        mirrored += hits[1]
    assert torch.equal(crops, random_crops(images, torch.tensor([2, 0, 1, 1]), 16, 4, (0, 5)))
    many = random_crops(images[:1], torch.zeros(200, dtype=torch.long), 64, 4, (1, 1))
    plain = [bool(torch.equal(crop, images[0])) for crop in many]
    assert 70 < sum(plain) < 130


def test_sides_between_are_averages_of_the_output() -> None:
    upscaler, images = Upscaler(SMALL).eval(), random_images(3, 8)
    large = upscale(upscaler, images, 32, batch=2)
    assert large.shape == (3, 3, 32, 32) and float(large.min()) >= 0 and float(large.max()) <= 1
    torch.testing.assert_close(upscale(upscaler, images, 16), F.avg_pool2d(large, 2))
    for side in (8, 33):
        with pytest.raises(UserError, match=f"upscale is {side}, of images of 8 pixels: expected 9 to 32"):
            upscale(upscaler, images, side)


def test_it_is_saved_in_half_precision(tmp_path: Path) -> None:
    upscaler = Upscaler(SMALL).half().float()
    save_upscaler(upscaler, tmp_path, {"psnr": 30.0})
    loaded = load_upscaler(tmp_path)
    images = random_images(1, 8)
    torch.testing.assert_close(loaded(images), upscaler(images))
    assert json.loads((tmp_path / "upscaler.json").read_text())["figures"] == {"psnr": 30.0}
    with pytest.raises(UserError, match="holds no upscaler: give renders512, or a folder"):
        load_upscaler(tmp_path / "other")
    (tmp_path / "model.safetensors").write_bytes(b"0")
    with pytest.raises(UserError, match="is damaged"):
        load_upscaler(tmp_path)


def test_structural_similarity_is_that_of_the_formula() -> None:
    """Of a constant image and a darker one only the luminance term is left (Wang et al. 2004, eq. 6)."""
    a, b = torch.full((3, 32, 32), 0.8), torch.full((3, 32, 32), 0.4)
    constant = 0.01**2
    assert ssim(a, b) == pytest.approx((2 * 0.8 * 0.4 + constant) / (0.8**2 + 0.4**2 + constant), abs=1e-5)
    assert ssim(a, a) == pytest.approx(1)


def test_the_shipped_one_is_better_than_interpolation_on_a_render() -> None:
    shape = make_shape("teapot")
    (camera,) = ring(1, 30.0, 512).split(1)
    view = render(RayCaster(shape.mesh), shape.albedo(np.array([0.2, 0.5, 0.8])), camera)
    image = torch.from_numpy(np.round(view.rgba * 255).astype(np.uint8)).permute(2, 0, 1)[None]
    data = CaptionedImages(image, [{"text": ""}])
    figures = upscaler_figures(load_upscaler("renders512"), data, (512,))
    assert figures["upscaler_psnr_512"] > figures["bicubic_psnr_512"] + 1, figures


def test_samples_are_also_written_large(tmp_path: Path) -> None:
    output = f"output={tmp_path}"
    script("sample", "prompts=[a red cube, a blue duck]", "count=1", "steps=1", "upscale=256", output)
    assert Image.open(tmp_path / "000_00.png").size == (64, 64)
    assert Image.open(tmp_path / "upscaled" / "001_00.png").size == (256, 256)
    assert Image.open(tmp_path / "upscaled.png").width >= 256
    message = script("sample", "a red cube", "steps=1", "upscale=600", output, code=2)
    assert "upscale is 600, of images of 64 pixels: expected 65 to 512" in message


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one stage"):
        UpscalerOptions(stages=())
    with pytest.raises(UserError, match="input_noise=-1"):
        UpscalerOptions(input_noise=-1)
    run = Run(RunOptions(str(tmp_path), 1, trackers=()), {}, "upscaler")
    small = CaptionedImages(bars(2).images[..., :16, :16], [{}] * 2)
    with pytest.raises(UserError, match="images of 16 pixels are smaller than crops of 32"):
        train_upscaler(run, small, SMALL)


def test_layers_of_an_export_are_enlarged_each(tmp_path: Path) -> None:
    """Side by side as before; without the option they stay as they are."""
    save_upscaler(Upscaler(SMALL), tmp_path, {})
    layers = random_images(2, 16)
    enlarge = enlargement(ExportOptions(upscale=32, upscaler=str(tmp_path)))
    both = enlarge(torch.cat([layers, layers.flip(-1)], -1))
    torch.testing.assert_close(both[..., :32], upscale(load_upscaler(tmp_path), layers, 32))
    assert both.shape == (2, 3, 32, 64)
    assert enlargement(ExportOptions())(layers) is layers
    with pytest.raises(UserError, match="holds no upscaler"):
        enlargement(ExportOptions(upscale=32, upscaler=str(tmp_path / "other")))
