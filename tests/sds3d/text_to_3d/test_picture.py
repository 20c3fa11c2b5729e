"""Pictures of one object: cut out by transparency or colour, centred and scaled; mistakes in one sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.runtime.errors import UserError
from sds3d.scene.cameras import orbit
from sds3d.text_to_3d.cut_out import cut_out
from sds3d.text_to_3d.picture import EXTENT, Frame, Picture, load_cut_out, silhouette_bounds
from sds3d.world.raycast import RayCaster, render
from sds3d.world.shapes import make_shape

RED = np.array([0.8, 0.15, 0.1])
Y, X = np.mgrid[-1:1:256j, -1:1:320j]


def ring_mask() -> np.ndarray:
    """A ring off the middle: the background is seen through it."""
    radius = np.hypot(X - 0.2, Y * 0.8 + 0.1)
    return (radius < 0.5) & (radius > 0.25)


def photo(mask: np.ndarray, background: np.ndarray | float = 0.8, noise: float = 0.01) -> np.ndarray:
    """A red object in light that falls off towards one corner."""
    light = 0.05 * X - 0.04 * Y - 0.03 * (X**2 + Y**2)
    image = np.where(mask[..., None], RED, np.broadcast_to(background, (*X.shape, 3)) + light[..., None])
    generator = np.random.default_rng(0)
    return (image + noise * generator.standard_normal(image.shape)).clip(0, 1)


def saved(path: Path, image: np.ndarray, mode: str = "RGB") -> Path:
    Image.fromarray((image * 255 + 0.5).astype(np.uint8), mode).save(path)
    return path


def load_picture(path: Path, resolution: int) -> Picture:
    return load_cut_out(path).picture(resolution)


def iou(alpha: np.ndarray, mask: np.ndarray) -> float:
    return float(np.minimum(alpha, mask).sum() / np.maximum(alpha, mask).sum())


# Cutting out


@pytest.mark.parametrize("background", [0.8, 0.3, np.array([0.3, 0.7, 0.4])])
def test_an_object_on_a_plain_background_is_cut_out(background: np.ndarray | float) -> None:
    colours, alpha = cut_out(photo(ring_mask(), background), "x")
    assert iou(alpha, ring_mask()) > 0.95
    assert np.abs(colours[alpha > 0.5] - RED).max() < 0.1  # no halo of the background


def test_specks_and_an_object_at_the_border_do_not_matter() -> None:
    mask = ring_mask()
    standing = mask | ((np.abs(X) < 0.3) & (Y > 0.2))
    image = photo(standing)
    image[20:26, 20:26] = 0.2
    _, alpha = cut_out(image, "x")
    assert iou(alpha, standing) > 0.95 and alpha[:40, :40].max() == 0


def test_alpha_at_the_edge_is_what_the_pixel_covers() -> None:
    fraction = np.clip((0.5 - np.hypot(X, Y)) * 64 + 0.5, 0, 1)[..., None]
    _, alpha = cut_out(fraction * RED + (1 - fraction) * 0.8, "x")
    assert np.abs(alpha - fraction[..., 0]).max() < 0.3 and np.abs(alpha - fraction[..., 0]).mean() < 0.01


def test_borders_that_are_not_plain_and_empty_pictures_raise() -> None:
    halves = np.where(X[..., None] < 0, np.array([0.2, 0.3, 0.8]), np.array([0.3, 0.6, 0.2]))
    noise = np.random.default_rng(0).random((256, 320, 3))
    for background in (halves, noise):
        with pytest.raises(UserError, match=r"border of photo.jpg is not plain .* transparency"):
            cut_out(photo(ring_mask(), background), "photo.jpg")
    with pytest.raises(UserError, match="nothing in photo.jpg stands out"):
        cut_out(photo(np.zeros_like(ring_mask())), "photo.jpg")


# Files


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_files_show_the_same_object_however_it_is_given(suffix: str, tmp_path: Path) -> None:
    cut = np.dstack([np.broadcast_to(RED, (*X.shape, 3)), ring_mask()])
    expected = load_picture(saved(tmp_path / "cut.png", cut, "RGBA"), 32)
    picture = load_picture(saved(tmp_path / f"photo.{suffix}", photo(ring_mask())), 32)
    assert picture.rgb.shape == (3, 32, 32) and picture.alpha.shape == (1, 32, 32)
    assert (picture.alpha - expected.alpha).abs().mean() < 0.03
    assert (picture.over(torch.zeros(2, 3)) - expected.over(torch.zeros(1, 3))).abs().mean() < 0.03


def test_place_and_size_in_the_file_do_not_matter(tmp_path: Path) -> None:
    """The object fills the square as far as the world's do on average, its box in the middle."""
    mask = (np.abs(X - 0.4) < 0.3) & (np.abs(Y + 0.5) < 0.4)
    cut = np.dstack([np.broadcast_to(RED, (*X.shape, 3)), mask])
    first = load_picture(saved(tmp_path / "a.png", cut, "RGBA"), 64)
    large = np.kron(cut, np.ones((4, 4, 1)))  # larger than the working size
    second = load_picture(saved(tmp_path / "b.png", large, "RGBA"), 64)
    assert (first.alpha - second.alpha).abs().mean() < 0.01
    rows, columns = first.alpha[0].gt(0.5).nonzero().T
    assert (rows.min() + rows.max()).item() == (columns.min() + columns.max()).item() == 63
    radius = torch.hypot(rows - 31.5, columns - 31.5).max().item() / 32
    assert radius == pytest.approx(EXTENT, abs=0.04)
    torch.testing.assert_close(first.rgb[:, 32, 32], torch.from_numpy(RED).float(), atol=0.01, rtol=0)


@pytest.mark.parametrize("frame", [Frame(0.2, -0.1, 0.5), Frame(-0.3, 0.4, 0.9)])
def test_a_frame_says_where_the_object_lies(frame: Frame, tmp_path: Path) -> None:
    """Also where the square reaches beyond the file, or the object beyond the square."""
    cut = np.dstack([np.broadcast_to(RED, (*X.shape, 3)), np.hypot(X + 0.5, Y * 0.8) < 0.4])
    picture = load_cut_out(saved(tmp_path / "a.png", cut, "RGBA")).picture(64, frame)
    rows, columns = (torch.arange(64) + 0.5) / 32 - 1, ((torch.arange(64) + 0.5) / 32 - 1)[:, None]
    expected = torch.hypot(rows - frame.right, columns - frame.down) < frame.extent
    assert (picture.alpha[0].gt(0.5) != expected).float().mean() < 0.02


def test_bounds_of_silhouettes() -> None:
    alpha = torch.zeros(2, 20, 30)
    alpha[0, 4:8, 10:20] = 1.0
    centre, radius = silhouette_bounds(alpha)
    assert centre[0].tolist() == [15.0, 6.0]
    assert radius[0] == pytest.approx(np.hypot(4.5, 1.5) + 0.5) and radius[1].isnan()


def test_the_extent_is_that_of_the_worlds_objects() -> None:
    """Which the world's camera sees at the distance and angle of view that pictures are given."""
    radii = []
    for name in ("cube", "teapot", "chair", "duck", "rocket", "house"):
        shape = make_shape(name)
        cameras = orbit(torch.arange(0.0, 360.0, 60.0), *(torch.full((6,), v) for v in (25.0, 3.0, 35.0)), 64)
        caster, albedo = RayCaster(shape.mesh), np.ones((len(shape.mesh.faces), 3))
        for camera in cameras.split(1):
            rows, columns = np.nonzero(render(caster, albedo, camera, 1).rgba[..., 3] > 0.5)
            middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
            radii.append(np.hypot(rows - middle[0], columns - middle[1]).max() / 32)
    assert np.mean(radii) == pytest.approx(EXTENT, abs=0.04)


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "missing.png"):
        with pytest.raises(UserError, match=rf"image .*{name} cannot be read .* PNG, JPEG or WebP"):
            load_cut_out(tmp_path / name)
    small = np.dstack([np.ones((256, 320, 3)), (np.abs(X) < 0.05) & (np.abs(Y) < 0.025)])
    with pytest.raises(UserError, match="has 16 x 6 pixels: at least 32"):
        load_cut_out(saved(tmp_path / "small.png", small, "RGBA"))
    empty = np.zeros((64, 64, 4))
    with pytest.raises(UserError, match="has 0 x 0 pixels"):
        load_cut_out(saved(tmp_path / "empty.png", empty, "RGBA"))
