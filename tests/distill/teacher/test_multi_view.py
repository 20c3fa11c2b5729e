"""The multi-view U-Net: what it adds, what it leaves as it was, and its folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule
from distill.core.views import IMAGE_EMBEDDING, POSE, REFERENCE, REFERENCE_POSE, relative_poses
from distill.runtime.errors import UserError
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.multi_view import (
    POSE_EMBEDDING,
    MultiViewUNet,
    load_view_conditions,
    pose_features,
    save_view_conditions,
)
from distill.teacher.unet import UnetOptions, build_unet, make_scheduler
from distill.teacher.view_training import ViewTrainingOptions

NO_POSE = torch.full((8, 5), torch.nan)


@pytest.fixture
def unet() -> Any:
    """All layers random: the zero ones too."""
    torch.manual_seed(0)
    options = UnetOptions(channels=(32,), layers=1, heads=2, views=ViewTrainingOptions(width=16))
    network = build_unet(options, 4, 4, 8, image_dim=6).eval().requires_grad_(False)
    torch.nn.init.normal_(network.view_conditions.pose_time.weight)
    return network


@pytest.fixture
def denoiser(unet: Any) -> UNetDenoiser:
    schedule = NoiseSchedule(make_scheduler(UnetOptions()).alphas_cumprod)
    return UNetDenoiser(unet, schedule, "v_prediction")


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, t, text embeddings and poses of 8 rows."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(8, 4, 4, 4, generator=generator)
    embedding, poses = (torch.randn(8, *shape, generator=generator) for shape in ((3, 8), (5,)))
    return x_t, torch.full((8,), 500), embedding, poses


def changed(first: Tensor, second: Tensor) -> list[bool]:
    """Which rows differ by more than rounding."""
    return ((first - second).abs().flatten(1).amax(1) > 1e-5).tolist()


def test_without_conditions_it_is_the_stock_unet(unet: Any, denoiser: UNetDenoiser) -> None:
    x_t, t, embedding, poses = inputs()
    stock = unet.stock()
    assert type(stock) is UNet2DConditionModel
    expected = stock(x_t, t, encoder_hidden_states=embedding).sample
    assert not any(changed(denoiser.output(x_t, t, Conditioning(embedding)), expected))
    assert not any(changed(denoiser.output(x_t, t, Conditioning(embedding, {POSE: NO_POSE})), expected))
    assert not any(changed(unet(x_t, t, encoder_hidden_states=embedding).sample, expected))
    assert all(changed(denoiser.output(x_t, t, Conditioning(embedding, {POSE: poses})), expected))


def test_rows_without_a_pose_do_not_see_the_others(denoiser: UNetDenoiser) -> None:
    x_t, t, embedding, poses = inputs()
    mixed = poses.clone()
    mixed[::2] = torch.nan
    plain = denoiser.output(x_t, t, Conditioning(embedding))
    output = denoiser.output(x_t, t, Conditioning(embedding, {POSE: mixed}))
    assert changed(output, plain) == [False, True] * 4


def test_the_pose_reaches_the_token_and_the_time_embedding(unet: Any, denoiser: UNetDenoiser) -> None:
    x_t, t, embedding, poses = inputs()
    before = denoiser.output(x_t, t, Conditioning(embedding, {POSE: poses}))
    conditions = unet.view_conditions
    weight = conditions.pose_time.weight.clone()
    conditions.pose_time.weight.zero_()
    by_token = denoiser.output(x_t, t, Conditioning(embedding, {POSE: poses}))
    assert all(changed(by_token, before))
    assert all(changed(by_token, denoiser.output(x_t, t, Conditioning(embedding))))
    conditions.pose_time.weight.copy_(weight)


def test_a_pose_is_read_together_with_the_text_and_the_picture(unet: Any) -> None:
    _, _, embedding, poses = inputs()
    images = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))

    def time_part(embedding: Tensor, **images: Tensor) -> Tensor:
        arguments = unet.view_conditions(Conditioning(embedding, {POSE: poses, **images}), torch.float32)
        part: Tensor = arguments["added_cond_kwargs"][POSE_EMBEDDING]
        return part

    first = time_part(embedding)
    assert all(changed(time_part(embedding.roll(1, 0)), first))
    assert all(changed(time_part(embedding, **{IMAGE_EMBEDDING: images}), first))
    assert not any(changed(time_part(embedding, **{IMAGE_EMBEDDING: images * torch.nan}), first))


def test_views_of_a_group_see_each_other_and_no_others(denoiser: UNetDenoiser) -> None:
    x_t, t, embedding, poses = inputs()
    moved = x_t.clone()
    moved[1] += 1
    for views, rows in ((1, [1]), (2, [0, 1]), (4, [0, 1, 2, 3])):
        conditioning = Conditioning(embedding, {POSE: poses}, views)
        difference = changed(denoiser.output(moved, t, conditioning), denoiser.output(x_t, t, conditioning))
        assert [row for row, differs in enumerate(difference) if differs] == rows


def test_the_order_of_views_does_not_matter(denoiser: UNetDenoiser) -> None:
    x_t, t, embedding, poses = inputs()
    order = torch.tensor([2, 0, 3, 1, 4, 5, 6, 7])
    output = denoiser.output(x_t, t, Conditioning(embedding, {POSE: poses}, 4))
    permuted = denoiser.output(x_t[order], t, Conditioning(embedding[order], {POSE: poses[order]}, 4))
    assert not any(changed(permuted, output[order]))


def test_a_picture_is_a_view_without_noise(denoiser: UNetDenoiser) -> None:
    """The rows are those of a group that begins with the picture, at time 0."""
    x_t, t, embedding, poses = inputs()
    picture = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    pose = torch.tensor([[0.0, 0.3, 3.0, 0.01, 0.0]])
    rows = slice(0, 3)
    extras = {POSE: poses[rows], REFERENCE: picture.expand(3, -1, -1, -1), REFERENCE_POSE: pose.expand(3, -1)}
    output = denoiser.output(x_t[rows], t[rows], Conditioning(embedding[rows], extras, 3))

    joined = Conditioning(
        torch.cat([embedding[:1], embedding[rows]]), {POSE: torch.cat([pose, poses[rows]])}, 4
    )
    times = torch.tensor([0, 500, 500, 500])
    expected = denoiser.output(torch.cat([picture, x_t[rows]]), times, joined)
    assert output.shape == (3, 4, 4, 4) and not any(changed(output, expected[1:]))


def test_a_picture_of_nan_is_none(denoiser: UNetDenoiser) -> None:
    """What it would show does not matter; the other group keeps its picture."""
    x_t, t, embedding, poses = inputs()
    pictures = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    pictures[:4], pictures[4:] = pictures[0].clone(), pictures[4].clone()
    extras = {POSE: poses, REFERENCE: pictures, REFERENCE_POSE: torch.zeros(8, 5)}
    both = denoiser.output(x_t, t, Conditioning(embedding, extras, 4))
    missing = pictures.clone()
    missing[4:] = torch.nan
    output = denoiser.output(x_t, t, Conditioning(embedding, {**extras, REFERENCE: missing}, 4))
    assert torch.isfinite(output).all() and changed(output, both) == [False] * 4 + [True] * 4


def test_the_embedding_of_a_picture_is_a_token(denoiser: UNetDenoiser) -> None:
    x_t, t, embedding, poses = inputs()
    pictures = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    pictures[4:] = torch.nan
    plain = denoiser.output(x_t, t, Conditioning(embedding, {POSE: poses}))
    output = denoiser.output(x_t, t, Conditioning(embedding, {POSE: poses, IMAGE_EMBEDDING: pictures}))
    assert changed(output, plain) == [True] * 4 + [False] * 4


def test_pose_features_have_no_seam_at_half_a_turn() -> None:
    poses = torch.tensor([[torch.pi, 0.3, 3.0, 0.0, 0.0], [-torch.pi, 0.3, 3.0, 0.0, 0.0]])
    first, second = pose_features(poses)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    turned = relative_poses(poses, torch.tensor([torch.pi / 2, torch.pi / 2]))
    torch.testing.assert_close(turned[:, 0], torch.full((2,), torch.pi / 2))


def test_its_folder_gives_it_back(tmp_path: Path, unet: Any, denoiser: UNetDenoiser) -> None:
    unet.half().float()  # as the folder rounds them, in place
    save_view_conditions(tmp_path, unet)
    loaded = load_view_conditions(tmp_path, unet.stock())
    assert isinstance(loaded, MultiViewUNet)
    x_t, t, embedding, poses = inputs()
    conditioning = Conditioning(embedding, {POSE: poses}, 4)
    again = UNetDenoiser(loaded.eval(), denoiser.schedule, "v_prediction").output(x_t, t, conditioning)
    assert not any(changed(again, denoiser.output(x_t, t, conditioning)))

    other = build_unet(UnetOptions(channels=(16,), layers=1, heads=2), 4, 4, 8)
    with pytest.raises(UserError, match="does not fit the U-Net beside it"):
        load_view_conditions(tmp_path, other)
    stock = unet.stock()
    assert load_view_conditions(tmp_path / "without", stock) is stock


def test_rows_must_divide_into_groups() -> None:
    with pytest.raises(UserError, match="8 rows cannot be divided into groups of 3"):
        Conditioning(torch.zeros(8, 3, 8), {}, 3)
    pair = Conditioning(torch.zeros(2, 3, 8), {}, 2)
    with pytest.raises(UserError, match=r"\[1, 2\] views"):
        Conditioning.cat([pair, Conditioning(torch.zeros(1, 3, 8))])
    assert pair.repeat(3).views == pair.select(slice(0, 2)).views == 2
