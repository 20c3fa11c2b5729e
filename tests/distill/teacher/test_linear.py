"""The linear encoder: exact where the encoder is linear, and differentiable."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.teacher.latent import LatentDiffusionTeacher
from distill.teacher.linear import dead_leaves, fit_linear_decoder, fit_linear_encoder

MATRIX, BIAS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]), torch.tensor([0.25, -1.0])


class Affine:
    """A teacher with a linear encoder and, optionally, noise that no linear fit explains."""

    latent_shape, resolution, device = (2, 4, 4), 16, torch.device("cpu")

    def __init__(self, unexplained: float = 0.0) -> None:
        self.unexplained = unexplained

    def encode_images(self, images: Tensor) -> Tensor:
        cells = F.avg_pool2d(images, 4)
        latents = torch.einsum("cd,bdhw->bchw", MATRIX, cells) + BIAS[:, None, None]
        return latents + self.unexplained * torch.randn(
            latents.shape, generator=torch.Generator().manual_seed(1)
        )


def test_the_fit_recovers_a_linear_encoder() -> None:
    teacher: Any = Affine()
    encoder = fit_linear_encoder(teacher)
    torch.testing.assert_close(encoder.matrix, MATRIX, atol=1e-4, rtol=0)
    torch.testing.assert_close(encoder.bias, BIAS, atol=1e-4, rtol=0)
    assert float(encoder.explained) == pytest.approx(1, abs=1e-6)
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))  # half the teacher's side
    whole = F.interpolate(images, scale_factor=2, mode="nearest")
    torch.testing.assert_close(encoder(images), teacher.encode_images(whole), atol=1e-4, rtol=0)


def test_the_explained_variance_is_measured() -> None:
    """With noise of deviation s on latents of variance v it is v / (v + s^2)."""
    plain, noisy = Affine(), Affine(1.0)
    images: list[Tensor] = []
    plain.encode_images = lambda batch: images.append(batch) or Affine().encode_images(batch)  # type: ignore[method-assign,func-returns-value]
    fit_linear_encoder(plain)  # type: ignore[arg-type]
    variance = float(Affine().encode_images(images[0]).transpose(0, 1).flatten(1).var(1).mean())
    noisy_fit = fit_linear_encoder(noisy)  # type: ignore[arg-type]
    assert float(noisy_fit.explained) == pytest.approx(variance / (variance + 1), abs=0.02)


def test_a_vae_encoder_and_the_gradient(tiny_teacher: LatentDiffusionTeacher) -> None:
    encoder = fit_linear_encoder(tiny_teacher, count=8)
    assert 0 < float(encoder.explained) <= 1
    images = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    latents = encoder(images)
    assert latents.shape == (1, *tiny_teacher.latent_shape)
    (slope,) = torch.autograd.grad(latents[0, 0, 0, 0], images)
    torch.testing.assert_close(slope.sum((0, 2, 3)), encoder.matrix[0])
    assert float(slope[..., 4:, :].abs().max()) == 0  # a latent depends on its own cell only


def test_the_decoder_recovers_the_colours_of_cells() -> None:
    """Of latents from which two of three colours can be computed exactly."""
    teacher: Any = Affine()
    decoder = fit_linear_decoder(teacher)
    images = dead_leaves(3, 16, torch.Generator().manual_seed(5))
    latents = teacher.encode_images(images)
    decoded = decoder(latents)
    assert decoded.shape == images.shape and 0.5 < float(decoder.explained) < 1
    assert decoded[..., :4, :4].std((-1, -2)).max() == 0  # one colour a cell
    error = (decoded - decoder.cells(images)).square().mean()
    assert error < 0.5 * (decoder.cells(images) - images.mean()).square().mean()
    torch.testing.assert_close(decoder.cells(images)[:, :, 0, 0], images[:, :, :4, :4].mean((2, 3)))


def test_the_decoder_is_exact_where_colours_are_linear_in_latents() -> None:
    class Colours(Affine):
        latent_shape = (3, 4, 4)

        def encode_images(self, images: Tensor) -> Tensor:
            mixed = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.0], [0.5, 0.0, -1.0]])
            return torch.einsum("cd,bdhw->bchw", mixed, F.avg_pool2d(images, 4)) - 0.3

    teacher: Any = Colours()
    decoder = fit_linear_decoder(teacher)
    images = dead_leaves(2, 16, torch.Generator().manual_seed(6))
    assert float(decoder.explained) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(
        decoder(teacher.encode_images(images)), decoder.cells(images), atol=1e-4, rtol=0
    )
    latents = torch.zeros(1, 3, 4, 4, requires_grad=True)
    decoder(latents + 0.2).sum().backward()
    assert latents.grad is not None and latents.grad.isfinite().all()


def test_dead_leaves_occlude_each_other() -> None:
    images = dead_leaves(4, 64, torch.Generator().manual_seed(0))
    assert images.shape == (4, 3, 64, 64) and images.min() >= 0 and images.max() <= 1
    flat = (images.diff(dim=-1) == 0).float().mean()
    assert 0.8 < flat < 1  # discs of one colour with sharp edges
