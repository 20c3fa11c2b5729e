"""The autoencoder: whitening changes only the latents; the loss by hand; a short training."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from distill.data.folders import CaptionedImages
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.teacher.vae import (
    VaeOptions,
    build_vae,
    gradient_loss,
    psnr,
    reconstruct,
    train_vae,
    vae_loss,
    whiten,
)

TINY = VaeOptions(factor=4, channels=(8, 8, 16), latent_channels=4, batch=8, learning_rate=1e-2)


def toy(count: int, seed: int = 0) -> CaptionedImages:
    """Smooth random images."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    images = torch.nn.functional.interpolate(coarse, 16, mode="bilinear")
    return CaptionedImages((images * 255).byte(), [{"text": "x"}] * count)


@pytest.fixture
def vae() -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_vae(TINY, 16).eval()


def latents_of(vae: AutoencoderKL, data: CaptionedImages) -> torch.Tensor:
    with torch.no_grad():
        return vae.encode(data.composite(slice(None)) * 2 - 1).latent_dist.sample(
            torch.Generator().manual_seed(5)
        )


def test_whitening_keeps_the_images_and_gives_unit_latents(vae: AutoencoderKL) -> None:
    data = toy(300)
    with torch.no_grad():  # different means and deviations, and noise well above rounding, as after training
        vae.quant_conv.weight[:4] *= torch.tensor([0.3, 1.0, 3.0, 10.0])[:, None, None, None]
        vae.quant_conv.bias[:4] += torch.tensor([2.0, -1.0, 0.0, 5.0])
    images = data.composite(slice(0, 20))
    before, raw = reconstruct(vae, images), latents_of(vae, data)
    whiten(vae, data, torch.Generator().manual_seed(0))
    torch.testing.assert_close(reconstruct(vae, images), before, atol=1e-4, rtol=0)
    white = latents_of(vae, data)
    assert raw.mean((0, 2, 3)).abs().max() > 1  # there was something to whiten
    torch.testing.assert_close(white.mean((0, 2, 3)), torch.zeros(4), atol=0.05, rtol=0)
    torch.testing.assert_close(white.std((0, 2, 3)), torch.ones(4), atol=0.05, rtol=0)
    assert vae.config.scaling_factor == pytest.approx(1 / float(white.std()), rel=0.05)
    # the same noise gives the same sample in whitened units: the posterior's deviation was rescaled too
    torch.testing.assert_close(
        white, (raw - raw.mean((0, 2, 3), True)) / raw.std((0, 2, 3), keepdim=True), atol=0.1, rtol=0
    )


def test_whitening_depends_on_its_generator_only(vae: AutoencoderKL) -> None:
    state, data, factors = {k: v.clone() for k, v in vae.state_dict().items()}, toy(40), []
    for seed in (1, 2):
        vae.load_state_dict(state)
        torch.manual_seed(seed)
        whiten(vae, data, torch.Generator().manual_seed(0), count=30)
        factors.append(vae.quant_conv.bias.detach().clone())
    assert factors[0].equal(factors[1])


@pytest.mark.parametrize(("factor", "channels"), [(1, (8,)), (4, (8, 8, 8)), (16, (8,) * 5)])
def test_the_factor_is_image_side_over_latent_side(factor: int, channels: tuple[int, ...]) -> None:
    vae = build_vae(VaeOptions(factor=factor, channels=channels, latent_channels=5), 32)
    with torch.no_grad():
        latent = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
        assert latent.shape == (1, 5, 32 // factor, 32 // factor)
        assert vae.decode(latent).sample.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(("factor", "levels"), [(8, 3), (4, 4), (16, 4), (3, 2), (32, 6)])
def test_refuses_a_factor_that_does_not_fit(factor: int, levels: int) -> None:
    with pytest.raises(UserError, match=f"factor {factor} with {levels} levels"):
        VaeOptions(factor=factor, channels=(8,) * levels)


def test_psnr() -> None:
    assert psnr(torch.tensor([0.01, 1.0])).tolist() == pytest.approx([20, 0], abs=1e-4)


def test_gradient_loss_depends_on_edges_not_levels() -> None:
    flat = torch.zeros(1, 1, 2, 3)
    assert float(gradient_loss(flat + 0.5, flat)) == 0
    corner = flat.clone()
    corner[0, 0, 0, 0] = 3.0  # one of 4 horizontal and one of 3 vertical differences
    assert float(gradient_loss(flat, corner)) == pytest.approx(3 / 4 + 3 / 3)


def test_loss_by_hand(vae: AutoencoderKL) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        options = VaeOptions(
            factor=4, channels=(8, 8, 16), latent_channels=4, kl_weight=0.7, gradient_weight=2.0
        )
        loss, square = vae_loss(vae, images, noise, options)
        posterior = vae.encode(images).latent_dist
        out = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().sum() / noise.numel()  # diffusers sums over a sample's elements
        expected = (
            (out - images).abs().mean()
            + (out - images).square().mean()
            + 2 * gradient_loss(out, images)
            + 0.7 * kl
        )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(square, ((out - images) / 2).square().mean())


def test_a_short_training_improves_and_whitens(tmp_path: Path, vae: AutoencoderKL) -> None:
    data, validation = toy(64), toy(16, seed=9)
    images = validation.composite(slice(None))
    trained = train_vae(Run(RunOptions(str(tmp_path), 40, trackers=()), {}, "vae"), data, validation, TINY)
    error = [float((reconstruct(model, images) - images).square().mean()) for model in (vae, trained)]
    assert error[1] < 0.7 * error[0]
    assert not trained.training
    torch.testing.assert_close(latents_of(trained, data).std((0, 2, 3)), torch.ones(4), atol=0.1, rtol=0)
    assert (tmp_path / "previews" / "reconstructions_00000040.png").is_file()
