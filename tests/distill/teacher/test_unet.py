"""The denoiser: its schedule, its target, its captions, and that it learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from distill.core.noise import NoiseSchedule
from distill.data.folders import CaptionedImages
from distill.data.latents import LatentCache, cache_latents
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.teacher import unet as module
from distill.teacher.latent import UNetDenoiser
from distill.teacher.unet import UnetOptions, build_unet, decode, denoising_loss, make_scheduler, train_unet
from distill.teacher.vae import VaeOptions, build_vae

TINY = UnetOptions(channels=(16, 16), heads=2, batch=8, learning_rate=1e-2)


def cache(count: int = 32) -> LatentCache:
    """Constant latents, +1 or -1 as the caption says; states are all 3, -3 and 0 (empty)."""
    caption = torch.arange(count) % 2
    latents = (1 - 2 * caption.float())[:, None, None, None].expand(count, 4, 4, 4)
    states = torch.tensor([3.0, -3.0, 0.0])[:, None, None].expand(3, 2, 8)
    return LatentCache(latents.contiguous(), states, caption)


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


def test_the_denoiser_reads_its_caption_on_every_level() -> None:
    unet = build_unet(UnetOptions(channels=(16, 32, 48)), 4, 8, 8)
    assert (
        unet.config.down_block_types == ["CrossAttnDownBlock2D"] * 3
        or unet.config.down_block_types == ("CrossAttnDownBlock2D",) * 3
    )
    assert unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.heads == 4
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        one, two = (unet(x, t, encoder_hidden_states=torch.full((1, 2, 8), v)).sample for v in (0.0, 1.0))
    assert one.shape == x.shape
    # uniform states give equal values at all keys, yet another mean: the answer must move
    assert float((one - two).abs().max()) > 1e-5


class Fixed(torch.nn.Module):
    """Answers with a given tensor and keeps what it was given."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer
        self.seen: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
        self.seen = [x_t, t, encoder_hidden_states]
        return type("Output", (), {"sample": self.answer})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_zero_for_the_right_answer_only(prediction: str) -> None:
    schedule = NoiseSchedule(torch.tensor([0.64, 0.36]))
    clean, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 0])
    alpha, sigma = (
        torch.tensor([0.8, 0.6, 0.8])[:, None, None, None],
        torch.tensor([0.6, 0.8, 0.6])[:, None, None, None],
    )
    right = noise if prediction == "epsilon" else alpha * noise - sigma * clean
    unet: Any = Fixed(right)
    assert float(
        denoising_loss(unet, schedule, (clean, noise, t, torch.zeros(3, 2, 8)), prediction)
    ) == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(unet.seen[0], alpha * clean + sigma * noise)
    unet.answer = right + 2
    assert float(
        denoising_loss(unet, schedule, (clean, noise, t, torch.zeros(3, 2, 8)), prediction)
    ) == pytest.approx(4)


def test_the_cache_holds_scaled_means_and_caption_places() -> None:
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=2.0)
    images = (torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255).byte()
    data = CaptionedImages(images, [{"text": text} for text in "babca"])
    got = cache_latents(vae, data, ["a", "b", "c"], torch.zeros(4, 2, 8), batch=2)
    assert got.caption.tolist() == [1, 0, 1, 2, 0]
    with torch.no_grad():
        expected = vae.encode(images[3:4].float() / 255 * 2 - 1).latent_dist.mean * 2
    torch.testing.assert_close(got.latents[3:4], expected, atol=1e-5, rtol=1e-4)


def test_decode_takes_the_scaling_factor_out() -> None:
    vae, latents = tiny_vae(), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.3
    plain = decode(vae, latents)
    vae.register_to_config(scaling_factor=2.0)
    torch.testing.assert_close(decode(vae, latents * 2), plain)
    assert plain.shape == (2, 3, 16, 16) and float(plain.std()) > 0


def states_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float) -> tuple[Tensor, Tensor]:
    """First elements of the states that the training gave, and signs of the latents they came with."""
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(unet: UNet2DConditionModel, schedule: NoiseSchedule, batch: Any, prediction: str) -> Tensor:
        seen.append((batch[3][:, 0, 0], batch[0][:, 0, 0, 0]))
        return next(unet.parameters()).sum() * 0

    monkeypatch.setattr(module, "denoising_loss", spy)
    options = UnetOptions(channels=(16, 16), heads=2, batch=64, caption_dropout=dropout)
    run = Run(RunOptions(str(tmp_path / str(dropout)), 8, trackers=(), preview_every=1000), {}, "unet")
    monkeypatch.setattr(run, "due", lambda every: False)  # no previews
    train_unet(run, cache(), tiny_vae(), options)
    return torch.cat([states for states, _ in seen]), torch.cat([latents for _, latents in seen])


def test_caption_dropout_uses_the_empty_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, latents = states_seen(tmp_path, monkeypatch, 0.25)
    empty = states == 0
    assert 0.17 < float(empty.float().mean()) < 0.33  # 512 draws: 4 standard errors
    assert states[~empty].equal(3 * latents[~empty])  # the others keep their own caption
    states, _ = states_seen(tmp_path, monkeypatch, 0.0)
    assert not bool((states == 0).any())


def test_a_short_training_lowers_the_loss_and_returns_the_average(tmp_path: Path) -> None:
    data, vae = cache(), tiny_vae()
    schedule = NoiseSchedule(make_scheduler(TINY).alphas_cumprod)
    noise = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    batch = (data.latents[:16], noise, torch.arange(16) * 66, data.states[data.caption[:16]])
    run = Run(RunOptions(str(tmp_path), 50, trackers=(), preview_every=50), {}, "unet")
    unet = train_unet(run, data, vae, TINY)
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())
    with torch.no_grad():
        loss = denoising_loss(unet, schedule, batch, "v_prediction")
        untrained = denoising_loss(build_unet(TINY, 4, 4, 8).eval(), schedule, batch, "v_prediction")
    assert float(loss) < 0.85 * float(untrained)
    assert (tmp_path / "previews" / "samples_00000050.png").is_file()
    told = UNetDenoiser(unet, schedule, "v_prediction").predict(noise, torch.full((16,), 999), batch[3])
    mean = told.x0.mean((1, 2, 3))
    assert (
        float(mean[::2].mean() - mean[1::2].mean()) > 0.5
    )  # 2 is right; from pure noise only the caption can tell
