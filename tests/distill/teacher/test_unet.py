"""The U-Net: its noise schedule, its target, its captions, a short training."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule, PredictionType
from distill.data.folders import CaptionedImages
from distill.data.latents import LatentCache, cache_latents
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.teacher.cache import encode_split
from distill.teacher.clip import ClipOptions, build_clip
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.folder import TeacherParts
from distill.teacher.unet import (
    UnetOptions,
    build_unet,
    compile_blocks,
    decode,
    denoising_loss,
    make_scheduler,
    train_unet,
)
from distill.teacher.vae import VaeOptions, build_vae
from distill.teacher.view_training import DenoisingBatch
from distill.teacher.vocabulary import build_tokenizer

TINY = UnetOptions(channels=(16, 16), heads=2, batch=8, learning_rate=1e-2)


def cache(count: int = 32) -> LatentCache:
    """Constant latents, +1 or -1 by caption; embeddings are all 3, -3 and 0 (the empty prompt)."""
    caption = torch.arange(count) % 2
    latents = (1 - 2 * caption.float())[:, None, None, None].expand(count, 4, 4, 4)
    embeddings = torch.tensor([3.0, -3.0, 0.0])[:, None, None].expand(3, 2, 8)
    return LatentCache(latents.contiguous(), Conditioning(embeddings), caption)


def tiny_vae() -> Any:
    return build_vae(VaeOptions(factor=4, channels=(8, 8, 8), latent_channels=4, layers=1), 16).eval()


def test_epsilon_at_zero_terminal_snr_is_refused() -> None:
    with pytest.raises(UserError, match="zero_snr=false"):
        UnetOptions(prediction="epsilon")
    with pytest.raises(UserError, match="caption_dropout is 1"):
        UnetOptions(caption_dropout=1.0)


@pytest.mark.parametrize("name", ["scaled_linear", "squaredcos_cap_v2"])
def test_the_last_level_is_pure_noise(name: Any) -> None:
    scheduler = make_scheduler(UnetOptions(schedule=name))
    schedule = NoiseSchedule(scheduler.alphas_cumprod)
    assert float(scheduler.alphas_cumprod[-1]) == 0 and float(schedule.alpha(torch.tensor([999]))) == 0
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    plain = make_scheduler(UnetOptions(schedule=name, zero_snr=False, prediction="epsilon"))
    assert float(plain.alphas_cumprod[-1]) > 0 and plain.config.prediction_type == "epsilon"


def test_the_denoiser_attends_to_its_caption_on_every_level() -> None:
    unet = build_unet(UnetOptions(channels=(16, 32, 48)), 4, 8, 8)
    assert list(unet.config.down_block_types) == ["CrossAttnDownBlock2D"] * 3
    assert unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.heads == 4
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        zeros, ones = (unet(x, t, encoder_hidden_states=torch.full((1, 2, 8), v)).sample for v in (0.0, 1.0))
    assert zeros.shape == x.shape
    # a constant embedding has equal values at all keys but another mean: the output must change
    assert float((zeros - ones).abs().max()) > 1e-5


class FixedOutput(torch.nn.Module):
    """Returns a given tensor and records its inputs."""

    dtype = torch.float32

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output
        self.inputs: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
        self.inputs = [x_t, t, encoder_hidden_states]
        return type("Output", (), {"sample": self.output})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_zero_for_the_right_output_only(prediction: PredictionType) -> None:
    schedule = NoiseSchedule(torch.tensor([0.64, 0.36]))
    clean, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 0])
    alpha = torch.tensor([0.8, 0.6, 0.8])[:, None, None, None]
    sigma = torch.tensor([0.6, 0.8, 0.6])[:, None, None, None]
    target = noise if prediction == "epsilon" else alpha * noise - sigma * clean
    network: Any = FixedOutput(target)
    denoiser, conditioning = UNetDenoiser(network, schedule, prediction), Conditioning(torch.zeros(3, 2, 8))
    assert float(denoiser.denoising_loss(clean, noise, t, conditioning)) == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(network.inputs[0], alpha * clean + sigma * noise)
    network.output = target + 2
    assert float(denoiser.denoising_loss(clean, noise, t, conditioning)) == pytest.approx(4)


def test_losses_of_x0_and_of_the_previous_image_are_by_hand() -> None:
    """A network whose x0 is off by 2, at a first and a second time."""
    schedule = NoiseSchedule(torch.tensor([0.64, 0.36]))
    clean, noise = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1])
    network: Any = FixedOutput(clean + 2)
    denoiser = UNetDenoiser(network, schedule, "sample")
    batch = DenoisingBatch(clean, noise, t, Conditioning(torch.zeros(2, 2, 8)))
    device = torch.device("cpu")
    assert float(denoising_loss(denoiser, batch, device, "x0")) == pytest.approx(4)
    # mean of x_0 given x_1: 0.8 (1 - 0.36 / 0.64) / (1 - 0.36) x0 + ...; at the first time it is x0 itself
    weight = 0.8 * (1 - 0.36 / 0.64) / 0.64
    expected = 4 * (1 + weight**2) / 2
    assert float(denoising_loss(denoiser, batch, device, "previous")) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="loss=x0: at high noise"):
        UnetOptions(prediction="epsilon", zero_snr=False, loss="x0")


def test_the_cache_contains_scaled_latents_and_caption_indices() -> None:
    images = (torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255).byte()
    data = CaptionedImages(images, [{"text": text} for text in "babca"])
    result = cache_latents(
        lambda x: 2 * x, data, ["a", "b", "c"], Conditioning(torch.zeros(4, 2, 8)), batch=2
    )
    assert result.caption.tolist() == [1, 0, 1, 2, 0]
    torch.testing.assert_close(result.latents, 2 * images.float() / 255)


def test_preparation_scales_the_posterior_mean() -> None:
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=2.0)
    images = (torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255).byte()
    data = CaptionedImages(images, [{"text": text} for text in "babca"])
    tokenizer, vocabulary = build_tokenizer(data.texts)
    clip = build_clip(ClipOptions(width=16, layers=1, text_width=16, text_layers=1), tokenizer, 16).eval()
    result, labels = encode_split(TeacherParts(tokenizer, vocabulary, clip, vae), data)
    assert labels is None
    assert result.conditioning.embedding.shape == (4, 24, 16)
    with torch.no_grad():
        expected = vae.encode(images[3:4].float() / 255 * 2 - 1).latent_dist.mean * 2
    torch.testing.assert_close(result.latents[3:4], expected, atol=1e-5, rtol=1e-4)


def test_decode_takes_the_scaling_factor_out() -> None:
    vae, latents = tiny_vae(), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.3
    plain = decode(vae, latents)
    vae.register_to_config(scaling_factor=2.0)
    torch.testing.assert_close(decode(vae, latents * 2), plain)
    assert plain.shape == (2, 3, 16, 16) and float(plain.std()) > 0


def training_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> tuple[Tensor, Tensor]:
    """First elements of the embeddings in training, and the signs of their latents."""
    batches: list[tuple[Tensor, Tensor]] = []

    def record(
        denoiser: UNetDenoiser, latents: Tensor, noise: Tensor, t: Tensor, conditioning: Conditioning
    ) -> Tensor:
        batches.append((conditioning.embedding[:, 0, 0], latents[:, 0, 0, 0]))
        return next(denoiser.parameters()).sum() * 0

    monkeypatch.setattr(UNetDenoiser, "denoising_loss", record)
    options = UnetOptions(channels=(16, 16), heads=2, batch=64, caption_dropout=dropout)
    run = Run(RunOptions(str(tmp_path / str(dropout)), 8, trackers=(), preview_every=1000), {}, "unet")
    monkeypatch.setattr(run, "due", lambda every: False)  # no previews
    train_unet(run, cache(), tiny_vae(), options)
    return torch.cat([embeddings for embeddings, _ in batches]), torch.cat(
        [latents for _, latents in batches]
    )


def test_caption_dropout_uses_the_empty_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, latents = training_batches(tmp_path, monkeypatch, 0.25)
    empty = embeddings == 0
    assert 0.17 < float(empty.float().mean()) < 0.33  # 512 draws: 4 standard errors
    assert embeddings[~empty].equal(3 * latents[~empty])  # the others keep their own caption
    embeddings, _ = training_batches(tmp_path, monkeypatch, 0.0)
    assert not bool((embeddings == 0).any())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_short_training_lowers_the_loss_and_returns_the_average(
    tmp_path: Path, optimizer: Literal["adamw", "muon"]
) -> None:
    data, vae = cache(), tiny_vae()
    schedule = NoiseSchedule(make_scheduler(TINY).alphas_cumprod)
    noise = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    conditioning = data.conditioning_of(torch.arange(16))
    batch = (data.latents[:16], noise, torch.arange(16) * 66, conditioning)
    run = Run(RunOptions(str(tmp_path), 50, trackers=(), preview_every=50), {}, "unet")
    unet = train_unet(run, data, vae, replace(TINY, optimizer=optimizer))
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())
    trained, untrained = (
        UNetDenoiser(network, schedule, "v_prediction")
        for network in (unet, build_unet(TINY, 4, 4, 8).eval())
    )
    with torch.no_grad():
        assert float(trained.denoising_loss(*batch)) < 0.85 * float(untrained.denoising_loss(*batch))
        prediction = trained.predict(noise, torch.full((16,), 999), conditioning)
    assert (tmp_path / "previews" / "samples_00000050.png").is_file()
    mean = prediction.x0.mean((1, 2, 3))
    # 2 is exact; pure noise carries no information, so the difference is due to the caption
    assert float(mean[::2].mean() - mean[1::2].mean()) > 0.5


def test_compiled_blocks_are_the_residual_and_the_transformer_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    unet = build_unet(UnetOptions(channels=(16, 32), heads=2), 4, 8, 32)
    compile_blocks(unet)
    names = [type(module).__name__ for module, _ in compiled]
    # Of one layer and two levels: down 2, middle 2, up 4 residual blocks; the middle has one transformer.
    assert (names.count("ResnetBlock2D"), names.count("BasicTransformerBlock")) == (8, 7) and len(names) == 15
    assert all(options == {"dynamic": False} for _, options in compiled)


@pytest.mark.parametrize("steps", [1, 20])
def test_a_warmup_of_one_step_or_less_trains(tmp_path: Path, steps: int) -> None:
    """5 % of 20 steps is a warm-up of one step, whose length OneCycleLR divides by (minus one)."""
    run = Run(RunOptions(str(tmp_path), steps, trackers=(), preview_every=1000), {}, "unet")
    unet = train_unet(run, cache(8), tiny_vae(), replace(TINY, batch=2))
    assert all(bool(value.isfinite().all()) for value in unet.parameters())
