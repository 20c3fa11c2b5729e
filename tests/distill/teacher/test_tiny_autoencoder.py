"""The tiny autoencoder: a short training, its figures by hand, stock diffusers, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from distill.core.noise import NoiseSchedule
from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.data.folders import CaptionedImages
from distill.one_step.points import MixtureStudy
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.runtime.run import Run, RunOptions
from distill.teacher.latent import LatentDiffusionTeacher
from distill.teacher.load import load_teacher
from distill.teacher.mixture import MixtureTeacher, ring
from distill.teacher.tiny_autoencoder import (
    FACTS,
    TinyAutoencoderOptions,
    autoencoder_figures,
    build_tiny_autoencoder,
    save_tiny_autoencoder,
    train_tiny_autoencoder,
    with_autoencoder,
)
from distill.teacher.vae import psnr

SMALL = TinyAutoencoderOptions(channels=8, blocks=(1, 1, 0, 0), batch=8, learning_rate=1e-2)


def toy(count: int, seed: int = 0) -> CaptionedImages:
    """Smooth random images of 64 pixels."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    images = torch.nn.functional.interpolate(coarse, 64, mode="bilinear")
    return CaptionedImages((images * 255).byte(), [{"text": "x"}] * count)


@pytest.fixture
def untrained(tiny_teacher: LatentDiffusionTeacher, tmp_path: Path) -> str:
    """The folder of an untrained one of the tiny teacher."""
    torch.manual_seed(0)
    tiny = build_tiny_autoencoder(tiny_teacher, SMALL).eval()
    save_tiny_autoencoder(tmp_path / "tiny", tiny, tiny_teacher, {"vae": 30.0})
    return str(tmp_path / "tiny")


def test_a_short_training_follows_the_vae(tmp_path: Path, tiny_teacher: LatentDiffusionTeacher) -> None:
    data, held_out = toy(64), toy(16, seed=9).composite(slice(None))
    figures = []
    for steps in (1, 120):
        run = Run(RunOptions(str(tmp_path / str(steps)), steps, trackers=()), {}, "tiny")
        tiny = train_tiny_autoencoder(run, tiny_teacher, data, SMALL)
        figures.append(autoencoder_figures(tiny_teacher, tiny, held_out, batch=5))
    before, after = figures
    assert after["decoder"] > before["decoder"] + 3  # dB
    assert after["latent_error"] < 0.5 * before["latent_error"]
    assert not tiny.training
    assert after["vae"] == pytest.approx(before["vae"])


def test_figures_by_hand(tiny_teacher: LatentDiffusionTeacher) -> None:
    """Each part of the tiny one beside the other part of the VAE, over images of all batches."""
    torch.manual_seed(1)
    tiny = build_tiny_autoencoder(tiny_teacher, SMALL).eval()
    images = toy(5).composite(slice(None))
    figures = autoencoder_figures(tiny_teacher, tiny, images, batch=2)
    with torch.no_grad():
        latents, encoded = tiny_teacher.encode_images(images), tiny.encode(images * 2 - 1).latents
        outputs = {
            "vae": tiny_teacher.decode(latents),
            "decoder": (tiny.decode(latents).sample / 2 + 0.5).clamp(0, 1),
            "encoder": tiny_teacher.decode(encoded),
        }
    for name, output in outputs.items():
        assert figures[name] == pytest.approx(float(psnr((output - images).square().mean())), rel=1e-4)
    assert figures["latent_error"] == pytest.approx(float((encoded - latents).square().mean()), rel=1e-4)


def test_a_teacher_encodes_and_decodes_by_it(tiny_teacher_folder: Path, untrained: str) -> None:
    """As diffusers does, differentiably; its latents have another fingerprint."""
    teacher = load_teacher(str(tiny_teacher_folder), autoencoder=untrained)
    stock = AutoencoderTiny.from_pretrained(untrained)
    images = toy(3).composite(slice(None)).requires_grad_()
    latents = teacher.encode_images(images)
    torch.testing.assert_close(latents, stock.encode(images * 2 - 1).latents)
    decoded = teacher.decode(latents)
    torch.testing.assert_close(decoded, (stock.decode(latents).sample / 2 + 0.5).clamp(0, 1))
    (gradient,) = torch.autograd.grad(decoded.sum(), images)
    assert gradient.abs().sum() > 0
    assert teacher.fingerprint() != load_teacher(str(tiny_teacher_folder)).fingerprint()
    assert teacher.resolution == 64 and teacher.latent_shape == (8, 8, 8)


def test_a_stock_pipeline_takes_it(tiny_teacher_folder: Path, untrained: str) -> None:
    """The same image as ours from the same noise."""
    teacher = load_teacher(str(tiny_teacher_folder), autoencoder=untrained)
    noise = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    model = Guided(teacher, teacher.encode_text([""]), 2.0)
    with torch.no_grad():
        latents = sample_ode(model, teacher.scheduler, teacher.encode_text(["a red cube"]), noise, 4)
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_teacher_folder, vae=AutoencoderTiny.from_pretrained(untrained), safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        "a red cube", latents=noise, num_inference_steps=4, guidance_scale=2.0, output_type="pt"
    ).images
    torch.testing.assert_close(teacher.decode(latents), stock, atol=2e-3, rtol=0)


def test_refuses_what_does_not_fit(
    schedule: NoiseSchedule, tiny_teacher: LatentDiffusionTeacher, untrained: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="'nowhere' cannot be loaded.*give a folder"):
        with_autoencoder(tiny_teacher, "nowhere")
    with pytest.raises(UserError, match="3 levels, and the VAE has 4"):
        build_tiny_autoencoder(tiny_teacher, replace(SMALL, blocks=(1, 0, 0)))
    stock = AutoencoderTiny(latent_channels=4, encoder_block_out_channels=(8,) * 4)
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(UserError, match="4 channels at 4 levels.* has 8 and 4"):
        with_autoencoder(tiny_teacher, str(tmp_path / "stock"))
    facts = read_json(Path(untrained) / FACTS)
    facts["vae"] = "0" * 16
    (Path(untrained) / FACTS).write_text(str(facts).replace("'", '"'))
    with pytest.raises(UserError, match="another VAE than that of teacher"):
        with_autoencoder(tiny_teacher, untrained)
    points = MixtureStudy(MixtureTeacher(ring(), schedule), steps=1)
    with pytest.raises(UserError, match="MixtureStudy has no VAE"):
        with_autoencoder(points, untrained)
