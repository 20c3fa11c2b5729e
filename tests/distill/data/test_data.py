"""Captioned folders and image files: reading, transparency over grey, error messages."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.folders import CaptionedImages, grey_levels, load_split, read_rows
from distill.data.images import BACKGROUND, GREY, image_files, load_image
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path, read_json, write_json


def write_split(folder: Path, images: list[Image.Image]) -> Path:
    split = folder / "train"
    split.mkdir(parents=True)
    rows = []
    for number, image in enumerate(images):
        image.save(split / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"caption {number}"})
    (split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def plain(colour: tuple[int, ...], size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour)


def test_reads_images_and_captions_in_order(tmp_path: Path) -> None:
    folder = write_split(tmp_path, [plain((255, 0, 0)), plain((0, 255, 0)), plain((0, 0, 255))])
    data = load_split(folder, "train", 8)
    assert data.texts == ["caption 0", "caption 1", "caption 2"]
    assert data.images.shape == (3, 3, 8, 8) and data.images.dtype == torch.uint8
    assert data.composite([1])[0, :, 0, 0].tolist() == [0, 1, 0]
    assert len(load_split(folder, "train", 8, limit=2)) == 2
    selected = data.select([2, 0])
    assert selected.texts == ["caption 2", "caption 0"] and selected.images[0, 2, 0, 0] == 255


def test_wide_image_is_centre_cropped_and_resized(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :8, 0] = pixels[:, 24:, 0] = 255  # red left and right of the centre square
    pixels[:8, 8:24, 2] = 255  # its upper half is blue
    data = load_split(write_split(tmp_path, [Image.fromarray(pixels)]), "train", 8)
    image = data.images[0].float() / 255
    assert image.shape == (3, 8, 8) and image[0].max() < 0.02
    assert image[2, :3].min() > 0.95 and image[2, 5:].max() < 0.05


def test_transparent_images_are_composited_over_grey(tmp_path: Path) -> None:
    images = [plain((200, 0, 0, 0)), plain((255, 0, 0, 255)), plain((255, 255, 255, 51))]
    data = load_split(write_split(tmp_path, images), "train", 8)
    pixels = data.composite([0, 1, 2], torch.tensor([0.5, 0.7, 0.0]))[:, :, 0, 0]
    torch.testing.assert_close(pixels, torch.tensor([[0.5] * 3, [1.0, 0.0, 0.0], [0.2] * 3]))
    split = data.composite(slice(None))
    assert split[0].std() == 0 and BACKGROUND[0] <= float(split[0, 0, 0, 0]) <= BACKGROUND[1]
    assert split.equal(data.composite(torch.arange(3)))
    for indices in ([2, 0], (2, 0), range(2, -1, -2)):  # an image keeps its level in every selection
        assert data.composite(indices).equal(split[[2, 0]])


def test_opaque_images_among_transparent_ones_get_full_alpha(tmp_path: Path) -> None:
    data = load_split(write_split(tmp_path, [plain((255, 0, 0)), plain((0, 255, 0, 0))]), "train", 8)
    assert data.images.shape[1] == 4
    pixels = data.composite([0, 1], torch.tensor([0.5, 0.5]))[:, :, 0, 0]
    torch.testing.assert_close(pixels, torch.tensor([[1.0, 0.0, 0.0], [0.5] * 3]))


def test_load_image_keeps_an_opaque_square_image_of_the_given_resolution(tmp_path: Path) -> None:
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for background in (GREY, 1.0):
        image = load_image(tmp_path / "a.png", 8, background)
        assert image.equal(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)


def test_load_image_crops_the_centre_and_composites_over_the_background(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 4), np.uint8)
    pixels[:, :8] = pixels[:, 24:] = (255, 0, 0, 255)  # red outside the centre square
    pixels[:8, 8:24] = (0, 0, 255, 255)  # its upper half is blue, the lower one transparent
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for background in (GREY, 1.0):
        image = load_image(str(tmp_path / "a.png"), 8, background)
        assert image.shape == (1, 3, 8, 8)
        expected = torch.tensor([[0.0, 0.0, 1.0], [background] * 3])
        torch.testing.assert_close(image[0, :, [1, 6], 4].T, expected, atol=0.02, rtol=0)


def test_image_files_are_sorted_and_a_folder_without_any_is_refused(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in image_files(tmp_path)] == ["a.JPG", "b.png"]
    for folder in (tmp_path / "none", tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="holds no images"):
            image_files(folder)


def test_grey_levels_are_fixed_without_a_generator_only() -> None:
    assert grey_levels(5).equal(grey_levels(5))
    generator = torch.Generator().manual_seed(0)
    first, second = grey_levels(500, generator), grey_levels(500, generator)
    assert not first.equal(second)
    assert BACKGROUND[0] <= first.min() < 0.45 and 0.95 < first.max() <= BACKGROUND[1]


def test_atomic_path_leaves_the_old_file_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"x": [1, 2]})
    assert read_json(path) == {"x": [1, 2]}
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        assert temporary.suffix == ".json" and temporary != path
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"x": [1, 2]}
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_missing_or_malformed_json_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.json does not exist"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match=r"b.json is not JSON"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"file_name": "0.png", "text": "x"}\n{', r"metadata.jsonl:2 is not JSON"),
        ('{"file_name": "0.png"}', r"metadata.jsonl:1 needs the keys"),
        ("[1]", r"metadata.jsonl:1 needs the keys"),
    ],
)
def test_malformed_rows_are_reported(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path)


def test_missing_and_unreadable_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metadata.jsonl does not exist"):
        load_split(tmp_path, "test")
    folder = write_split(tmp_path, [plain((1, 2, 3))])
    (folder / "train" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0.png cannot be read as an image"):
        load_split(folder, "train", 8)
    (folder / "train" / "0.png").unlink()
    with pytest.raises(UserError, match=r"0.png cannot be read"):
        load_split(folder, "train", 8)


def test_selection_keeps_metadata_columns() -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "object": "cube"}, {"text": "b", "object": "cone"}]
    data = CaptionedImages(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), rows)
    assert len(data) == 2 and data.select([1]).rows == [rows[1]]
