"""Batches of single images, of groups and of pictured objects, and a training that learns the camera."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.views import IMAGE_EMBEDDING, POSE, REFERENCE, REFERENCE_POSE, is_given
from distill.data.folders import CaptionedImages
from distill.data.latents import LatentCache
from distill.data.views import ViewLabels, choose_views, group_backgrounds, group_size_of, label_views
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.unet import UnetOptions, make_batches, make_scheduler, train_unet
from distill.teacher.vae import VaeOptions, build_vae
from distill.teacher.view_training import ViewBatches, ViewTrainingOptions

GROUPS, SIZE = 12, 6  # every third group is nameless


def labelled(seed: int = 0) -> tuple[LatentCache, ViewLabels]:
    """Latents whose mean is their row, so that a batch says which rows it holds."""
    generator = torch.Generator().manual_seed(seed)
    count = GROUPS * SIZE
    latents = torch.arange(count).float()[:, None, None, None].expand(count, 4, 4, 4).contiguous()
    captions = torch.arange(count) // SIZE % 2
    embeddings = torch.tensor([1.0, 2.0, 0.0])[:, None, None].expand(3, 2, 8)
    poses = torch.rand(count, 5, generator=generator)
    has_caption = torch.arange(count) // SIZE % 3 != 2
    labels = ViewLabels(poses, torch.rand(count, 6, generator=generator), has_caption, SIZE)
    return LatentCache(latents, Conditioning(embeddings), captions), labels


def rows_of(latents: Tensor) -> Tensor:
    return latents.mean((1, 2, 3)).round().long()


def draw(options: ViewTrainingOptions, step: int = 0, batch: int = 20, dropout: float = 0.0) -> list[Any]:
    cache, labels = labelled()
    batches = ViewBatches(cache, labels, options, batch, seed=0)
    return batches.draw(step, torch.Generator().manual_seed(step), 1000, dropout)


def test_a_batch_has_its_shares() -> None:
    options = ViewTrainingOptions(views=4, grouped=0.4, pictured=0.4)
    assert options.counts(20) == (4, 2, 2) and options.counts(64) == (16, 6, 6)
    single, grouped, pictured = draw(options)
    assert (len(single.t), len(grouped.t), len(pictured.t)) == (4, 8, 6)  # a picture is no row of the loss
    assert [part.conditioning.views for part in (single, grouped, pictured)] == [1, 4, 3]


def test_single_images_have_captions_and_poses_of_their_own() -> None:
    _, labels = labelled()
    parts = [draw(ViewTrainingOptions(pose_dropout=0.5), step)[0] for step in range(20)]
    rows = torch.cat([rows_of(part.latents) for part in parts])
    poses = torch.cat([part.conditioning.extras[POSE] for part in parts])
    given = is_given(poses)
    assert labels.has_caption[rows].all() and 0.3 < float(given.float().mean()) < 0.7
    torch.testing.assert_close(poses[given], labels.poses[rows[given]])
    assert len(parts[0].t.unique()) > 1


def test_groups_show_one_object_at_one_level() -> None:
    _, labels = labelled()
    for step in range(5):
        grouped = draw(ViewTrainingOptions(), step)[1]
        rows = rows_of(grouped.latents).view(-1, 4)
        assert (rows // SIZE == rows[:, :1] // SIZE).all() and labels.has_caption[rows].all()
        assert all(len(row.unique()) == 4 for row in rows)
        assert (grouped.t.view(-1, 4) == grouped.t.view(-1, 4)[:, :1]).all()
        torch.testing.assert_close(grouped.conditioning.extras[POSE], labels.poses[rows.flatten()])
        noise = grouped.noise.unflatten(0, (-1, 4))
        assert not torch.equal(noise[:, 0], noise[:, 1])


def test_pictures_are_other_views_of_the_same_object_and_set_the_azimuth() -> None:
    _, labels = labelled()
    nameless = 0
    for step in range(10):
        part = draw(
            ViewTrainingOptions(nameless=0.5, picture_text=0, picture_dropout=0, embedding_dropout=0), step
        )[2]
        extras = part.conditioning.extras
        rows, pictures = rows_of(part.latents), rows_of(extras[REFERENCE])
        assert (rows // SIZE == pictures // SIZE).all() and (rows != pictures).all()
        assert (extras[REFERENCE_POSE][:, 0] == 0).all()
        turned = labels.poses[rows, 0] - labels.poses[pictures, 0]
        torch.testing.assert_close(extras[POSE][:, 0], turned)
        torch.testing.assert_close(extras[POSE][:, 1:], labels.poses[rows, 1:])
        torch.testing.assert_close(extras[IMAGE_EMBEDDING], labels.image_embedding[pictures])
        assert (part.conditioning.embedding == 0).all()  # the empty prompt
        nameless += int((~labels.has_caption[rows]).sum())
    assert nameless == 10 * 3


def test_dropped_conditions_are_those_of_whole_groups() -> None:
    texts, hidden, pictures = [], [], []
    for step in range(20):
        _, grouped, pictured = draw(
            ViewTrainingOptions(picture_text=0.5, picture_dropout=0.3), step, dropout=0.5
        )
        texts.append((grouped.conditioning.embedding[:, 0, 0] == 0).view(-1, 4))
        extras = pictured.conditioning.extras
        hidden.append(extras[IMAGE_EMBEDDING].isnan().all(1).view(-1, 3))
        pictures.append(extras[REFERENCE].isnan().flatten(1).all(1).view(-1, 3))
        assert (hidden[-1] | ~pictures[-1]).all()  # without the picture, no embedding of it
    for flags in (torch.cat(texts), torch.cat(hidden), torch.cat(pictures)):
        assert (flags == flags[:, :1]).all() and 0 < int(flags.sum()) < flags.numel()


def test_labels_of_a_folder() -> None:
    images = torch.zeros(6, 4, 8, 8, dtype=torch.uint8)
    rows = [
        {"text": "a cube" if i < 3 else "", "pose": [0.1 * i, 0, 3, 0, 0], "group": i // 3} for i in range(6)
    ]
    data = CaptionedImages(images, rows)
    labels = label_views(data, torch.zeros(6, 2))
    assert labels.group_size == 3 and labels.has_caption.tolist() == [True] * 3 + [False] * 3
    assert labels.groups_with_caption.tolist() == [0] and labels.first_rows.tolist() == [0, 3]
    levels = group_backgrounds(6, 3)
    assert len(levels[:3].unique()) == 1 and levels[0] != levels[3]
    with pytest.raises(UserError, match=r"\[2, 4\] consecutive rows"):
        group_size_of(CaptionedImages(images, [{**row, "group": int(i > 1)} for i, row in enumerate(rows)]))
    with pytest.raises(UserError, match="has 2 numbers"):
        group_size_of(CaptionedImages(images, [{**row, "pose": [0, 1]} for row in rows]))


def test_views_are_chosen_without_repetition() -> None:
    chosen = choose_views(torch.tensor([0, 6]), 6, 4, torch.Generator().manual_seed(0))
    assert chosen.shape == (2, 4) and all(len(row.unique()) == 4 for row in chosen)
    assert (chosen[0] < 6).all() and (chosen[1] >= 6).all() and (chosen < 12).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grouped": 0.7, "pictured": 0.7}, "at most 1"),
        ({"nameless": 1.5}, "nameless is 1.5"),
        ({"views": 1}, "2"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ViewTrainingOptions(**options)


def test_groups_with_too_few_views_are_refused() -> None:
    with pytest.raises(UserError, match="groups have 6 views and training takes 8"):
        ViewBatches(*labelled(), ViewTrainingOptions(views=8), 32, 0)
    cache, labels = labelled()
    with pytest.raises(UserError, match="teacher.unet.views=null"):
        make_batches(cache, None, UnetOptions(views=ViewTrainingOptions()), 0)
    assert (
        make_batches(cache, labels, UnetOptions(), 0)
        .draw(0, torch.Generator(), 10, 0.0)[0]
        .conditioning.views
        == 1
    )


def test_a_short_training_learns_the_camera(tmp_path: Path) -> None:
    """Latents are the sine of the azimuth: without the camera nothing can be known of them."""
    count = 96
    azimuth = torch.linspace(-3.1, 3.1, count)[
        torch.randperm(count, generator=torch.Generator().manual_seed(1))
    ]
    poses = torch.cat(
        [azimuth[:, None], torch.zeros(count, 1), torch.full((count, 1), 3.0), torch.zeros(count, 2)], 1
    )
    latents = (2 * azimuth.sin())[:, None, None, None].expand(count, 4, 4, 4).contiguous()
    conditioning = Conditioning(torch.zeros(2, 2, 8))
    cache = LatentCache(latents, conditioning, torch.zeros(count, dtype=torch.long))
    labels = ViewLabels(poses, torch.zeros(count, 6), torch.ones(count, dtype=torch.bool), 4)
    views = ViewTrainingOptions(views=2, width=16, pose_dropout=0.3, grouped=0.3, pictured=0.2)
    options = UnetOptions(
        channels=(32,), layers=1, heads=2, batch=16, learning_rate=5e-3, ema=0.9, views=views
    )
    run = Run(RunOptions(directory=str(tmp_path), steps=100, preview_every=1000, device="cpu"), {}, "unet")
    vae = build_vae(VaeOptions(factor=4, channels=(8, 8, 8), latent_channels=4, layers=1), 16).eval()
    unet = train_unet(run, cache, vae, options, labels=labels)

    denoiser = UNetDenoiser(unet, run_schedule(), "v_prediction")
    t, noise = (
        torch.full((count,), 900),
        torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)),
    )
    text = conditioning.select(torch.zeros(count, dtype=torch.long))
    with torch.no_grad():
        with_pose, without = (
            float(denoiser.denoising_loss(latents, noise, t, each))
            for each in (text.with_extras(**{POSE: poses}), text)
        )
    assert with_pose < 0.6 * without


def run_schedule() -> Any:
    from distill.core.noise import NoiseSchedule

    return NoiseSchedule(make_scheduler(UnetOptions()).alphas_cumprod)
