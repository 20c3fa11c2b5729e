"""The world's rows, captions, images and folders."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from distill.runtime.errors import UserError
from distill.runtime.files import read_json, write_json
from sds3d.scene.cameras import Cameras
from sds3d.text_to_3d.prompts import VIEWS, margin, view_of
from sds3d.world.shapes import COLOURS, OBJECTS, RELATIONS, make_shape, noun_phrase
from sds3d.world.world import SIMPLE, WorldOptions, held_out, make_world, sample_row

OPTIONS = WorldOptions()
SMALL = WorldOptions(6, 2, 3, seed=2, pairs=0.4, resolution=16)  # with a pair in each split
BLOCK = 4
READ = """
import json, sys
from datasets import load_dataset
for folder, cache in zip(sys.argv[1::2], sys.argv[2::2]):
    data = load_dataset("imagefolder", data_dir=folder, cache_dir=cache)
    row = data["train"][1]
    image, columns = row["image"], data["train"].column_names
    print(json.dumps({"counts": {k: len(v) for k, v in data.items()}, "text": row["text"], "columns": columns,
                      "mode": image.mode, "size": image.size, "corner": image.getpixel((0, 0))}))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world with geometry, written by two worker processes."""
    folder = tmp_path_factory.mktemp("world") / "small"
    make_world(folder, replace(SMALL, geometry=True), workers=2, block=BLOCK)
    return folder


def _bytes(folder: Path, without: str = "") -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: content for name, content in named.items() if not (without and re.match(without, name))}


@lru_cache
def _rows(split: str, count: int) -> list[dict[str, Any]]:
    return [sample_row(OPTIONS, split, index)[0] for index in range(count)]


def _row(options: WorldOptions, split: str, index: int) -> dict[str, Any]:
    return sample_row(options, split, index)[0]


def _combinations(rows: Iterable[dict[str, Any]]) -> set[tuple[str, str]]:
    rows = list(rows)
    second = {(row["second_object"], row["second_colour"]) for row in rows if row["relation"]}
    return {(row["object"], row["colour"]) for row in rows} | second


def _view_word(text: str) -> str | None:
    def has_view(view: str) -> bool:
        return text.endswith((f", {view} view", f" from the {view}")) or text.startswith(f"{view} view of ")

    return next(filter(has_view, VIEWS), None)


def test_row_is_a_function_of_seed_split_and_index() -> None:
    state = torch.get_rng_state()
    camera: Cameras = sample_row(OPTIONS, "test", 7)[1]
    assert torch.get_rng_state().equal(state), "the global generator is not used"
    rows = [_row(options, "test", 7) for options in (OPTIONS, replace(OPTIONS, train=3, test=9))]
    assert rows[0] == rows[1] == _rows("test", 10)[7]
    assert camera.position.equal(sample_row(OPTIONS, "test", 7)[1].position)
    others = [
        _row(replace(OPTIONS, seed=1), "test", 7),
        _row(OPTIONS, "validation", 7),
        _row(OPTIONS, "test", 8),
    ]
    assert len({row["seed"] for row in (*others, rows[0])}) == 4


def test_every_object_has_one_held_out_colour() -> None:
    assert all(sum(held_out(name, colour) for colour in COLOURS) == 1 for name in OBJECTS)
    assert len({colour for name in OBJECTS for colour in COLOURS if held_out(name, colour)}) == len(COLOURS)


def test_training_split_has_all_but_the_held_out_combinations() -> None:
    combinations = _combinations(_rows("train", 3000))
    assert combinations == {
        (name, colour) for name in OBJECTS for colour in COLOURS if not held_out(name, colour)
    }
    assert not any(row["held_out"] for row in _rows("train", 3000))


def test_without_hold_out_training_has_every_combination() -> None:
    rows = [_row(replace(OPTIONS, hold_out=False, pairs=0.0), "train", index) for index in range(3000)]
    assert {(row["object"], row["colour"]) for row in rows} == {
        (name, colour) for name in OBJECTS for colour in COLOURS
    }
    assert all(row["held_out"] == held_out(row["object"], row["colour"]) for row in rows)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_half_of_the_evaluation_objects_are_held_out(split: str) -> None:
    single = [row for row in _rows(split, 1500) if not row["relation"]]
    assert np.mean([row["held_out"] for row in single]) == pytest.approx(0.5, abs=0.05)
    assert all(row["held_out"] == held_out(row["object"], row["colour"]) for row in single)
    held = _combinations(row for row in single if row["held_out"])
    assert {name for name, _ in held} == set(OBJECTS)


def test_pairs_are_of_simple_objects_at_the_given_fraction() -> None:
    pairs = [row for row in _rows("train", 3000) if row["relation"]]
    assert len(pairs) / 3000 == pytest.approx(OPTIONS.pairs, abs=0.02)
    assert {row["relation"] for row in pairs} == set(RELATIONS)
    assert {row["object"] for row in pairs} == {row["second_object"] for row in pairs} == set(SIMPLE)
    assert not any(
        row["relation"] for row in (_row(replace(OPTIONS, pairs=0), "train", i) for i in range(50))
    )
    assert all(row["relation"] for row in (_row(replace(OPTIONS, pairs=1), "train", i) for i in range(50)))


def test_captions_name_the_objects_with_the_right_article() -> None:
    for row in _rows("train", 3000):
        things = [f"{row['colour']} {row['object']}"]
        if row["relation"]:
            things.append(f"{row['relation']} {noun_phrase(row['second_colour'], row['second_object'])}")
        assert " ".join(things) in row["text"], row["text"]
        assert all(
            (article == "an") == (word[0] in "aeiou")
            for article, word in re.findall(r"\b(an?) (\w+)", row["text"])
        )
    assert noun_phrase("orange", "car") == "an orange car" and noun_phrase("red", "car") == "a red car"


def test_view_words_follow_the_camera_and_are_dropped_at_the_given_fraction() -> None:
    rows = _rows("train", 3000)
    for row in rows:
        azimuth, elevation = row["azimuth"], row["elevation"]
        if abs(margin(azimuth, elevation) - OPTIONS.view_margin) > 1e-2:  # angles are rounded in the row
            clear = margin(azimuth, elevation) > OPTIONS.view_margin
            assert row["view"] == (view_of(azimuth, elevation) if clear else "")
        assert _view_word(row["text"]) in (None, row["view"] or None)
    named = [row for row in rows if row["view"]]
    assert {row["view"] for row in named} == set(VIEWS) and len(named) < 0.9 * len(rows)
    dropped = np.mean([_view_word(row["text"]) is None for row in named])
    assert dropped == pytest.approx(OPTIONS.drop_view, abs=0.03)


def test_has_front_is_that_of_the_shape() -> None:
    for row in _rows("train", 300):
        assert row["has_front"] == (not row["relation"] and make_shape(row["object"]).has_front)


@pytest.mark.parametrize(
    "changes",
    [
        {"pairs": 1.5},
        {"drop_view": -0.1},
        {"train": -1},
        {"supersample": 0},
        {"resolution": 4},
        {"pairs": float("nan")},
    ],
)
def test_options_out_of_range_raise(changes: dict[str, float]) -> None:
    with pytest.raises(UserError):
        WorldOptions(**changes)


def test_folder_has_an_image_for_each_row(written: Path) -> None:
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        lines = (written / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        expected = [_row(SMALL, split, index) for index in range(count)]
        assert [json.loads(line) for line in lines] == expected
        names = sorted(path.name for path in (written / split).iterdir())
        assert names == sorted([row["file_name"] for row in expected] + ["metadata.jsonl"])
        for row in expected:
            image = Image.open(written / split / row["file_name"])
            assert (image.mode, image.size) == ("RGBA", (16, 16))
            assert image.getpixel((0, 0))[3] == 0 and np.asarray(image)[..., 3].mean() > 10


def test_images_have_the_colour_of_their_caption(tmp_path: Path, in_process: None) -> None:
    options = replace(SMALL, train=8, validation=0, test=0, pairs=0, resolution=32)
    make_world(tmp_path / "w", options, workers=1)
    for line in (tmp_path / "w" / "train" / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pixels = np.asarray(Image.open(tmp_path / "w" / "train" / row["file_name"])).reshape(-1, 4) / 255
        pixels = pixels[pixels[:, 3] == 1][:, :3]
        colour = np.array(COLOURS[row["colour"]])
        hue = pixels / np.linalg.norm(pixels, axis=1, keepdims=True) @ (colour / np.linalg.norm(colour))
        assert (hue > 0.99).mean() > 0.1, row["text"]


def test_content_is_independent_of_workers_and_blocks(
    written: Path, tmp_path: Path, in_process: None
) -> None:
    make_world(tmp_path / "again", SMALL, workers=1)  # another block size, and no geometry
    assert _bytes(tmp_path / "again", "world.json") == _bytes(written, "world.json|geometry/")
    make_world(tmp_path / "other", replace(SMALL, seed=5), workers=1)
    assert _bytes(tmp_path / "other")["train/000000.png"] != _bytes(written)["train/000000.png"]


def test_random_light_changes_colours_but_not_silhouettes(
    written: Path, tmp_path: Path, in_process: None
) -> None:
    make_world(tmp_path / "lit", replace(SMALL, train=3, validation=0, test=0, random_light=True), workers=1)
    for name in ("000000.png", "000001.png", "000002.png"):
        lit, plain = (
            np.asarray(Image.open(folder / "train" / name)) for folder in (tmp_path / "lit", written)
        )
        assert (lit[..., 3] == plain[..., 3]).all() and (lit[..., :3] != plain[..., :3]).any()


def test_interrupted_writing_resumes(tmp_path: Path, in_process: None) -> None:
    folder, options = tmp_path / "w", replace(SMALL, geometry=True)
    make_world(folder, options, workers=1, block=BLOCK)
    before = _bytes(folder)
    for name in (
        "train/000001.png",
        "train/000005.png",
        "test/000002.png",
        "train/metadata.jsonl",
        "geometry/train-000004.safetensors",
    ):
        (folder / name).unlink()
    time = (folder / "train" / "000002.png").stat().st_mtime_ns
    make_world(folder, options, workers=1, block=BLOCK)
    assert _bytes(folder) == before
    assert (folder / "train" / "000002.png").stat().st_mtime_ns == time, (
        "existing images are not rendered again"
    )


def test_world_extends_to_a_larger_one(written: Path, tmp_path: Path, in_process: None) -> None:
    folder, options = tmp_path / "w", replace(SMALL, geometry=True)
    make_world(folder, replace(options, train=2, test=0), workers=1, block=BLOCK)
    make_world(folder, options, workers=1, block=BLOCK)
    assert _bytes(folder) == _bytes(written)


def test_world_with_the_resolution_among_its_camera_options_extends(tmp_path: Path, in_process: None) -> None:
    """As world.json of earlier versions has it."""
    make_world(tmp_path / "w", replace(SMALL, train=2), workers=1)
    values = read_json(tmp_path / "w" / "world.json")
    values["camera"]["resolution"] = values.pop("resolution")
    write_json(tmp_path / "w" / "world.json", values)
    with pytest.raises(UserError, match="another resolution"):
        make_world(tmp_path / "w", replace(SMALL, resolution=32), workers=1)
    make_world(tmp_path / "w", SMALL, workers=1)
    assert len(list((tmp_path / "w" / "train").glob("*.png"))) == 6


def test_other_options_in_the_same_folder_raise(written: Path) -> None:
    before = _bytes(written)
    for options, word in ((SMALL, "geometry"), (replace(SMALL, geometry=True, seed=1), "seed")):
        with pytest.raises(UserError, match=word):
            make_world(written, options, workers=1)
    assert _bytes(written) == before


def test_folder_with_other_content_raises_and_is_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="not empty"):
        make_world(tmp_path, SMALL, workers=1)
    assert _bytes(tmp_path) == {"thesis.txt": b"mine"}


def test_no_workers_raise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers"):
        make_world(tmp_path / "w", SMALL, workers=0)
    assert not (tmp_path / "w").exists()


def test_geometry_agrees_with_the_images(written: Path) -> None:
    blocks = {"train": [0, 4], "validation": [0], "test": [0]}
    for split, firsts in blocks.items():
        parts = [load_file(written / "geometry" / f"{split}-{first:06d}.safetensors") for first in firsts]
        depth, normal, part = (
            np.concatenate([block[key] for block in parts]) for key in ("depth", "normal", "part")
        )
        images = [Image.open(path) for path in sorted((written / split).glob("*.png"))]
        hit = np.stack([np.asarray(image)[..., 3] for image in images]) > 0
        assert depth.shape == hit.shape and depth.dtype == np.float16
        assert normal.shape == (*hit.shape, 3) and normal.dtype == np.int8
        np.testing.assert_array_equal(depth > 0, hit)
        np.testing.assert_array_equal(part > 0, hit)
        assert depth[hit].min() > 2.75 - 0.9 and depth.max() < 3.25 + 0.9
        length = np.linalg.norm(normal.astype(np.float32) / 127, axis=-1)
        assert (np.abs(length[hit] - 1) < 0.02).all() and (length[~hit] == 0).all()
    assert len(list((written / "geometry").iterdir())) == 4


@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_columns_have_no_nulls(pairs: float) -> None:
    """`datasets` cannot infer the type of a column of nulls, as without pairs."""
    for i in range(40):
        assert None not in _row(replace(OPTIONS, pairs=pairs), "train", i).values()


@pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed (pip install datasets)")
def test_datasets_reads_the_folder(written: Path, tmp_path: Path, in_process: None) -> None:
    """With geometry, and without it but with the temporary file of a killed writer."""
    make_world(tmp_path / "plain", SMALL, workers=1)
    (tmp_path / "plain" / "train" / ".000001.123.png").write_bytes(b"torn")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    folders = [str(path) for path in (written, tmp_path / "cache1", tmp_path / "plain", tmp_path / "cache2")]
    done = subprocess.run(
        [sys.executable, "-c", READ, *folders],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    row = _row(SMALL, "train", 1)
    for line in done.stdout.splitlines()[-2:]:
        loaded = json.loads(line)
        assert loaded["counts"] == {"train": 6, "validation": 2, "test": 3}
        assert (loaded["text"], loaded["mode"], loaded["size"]) == (row["text"], "RGBA", [16, 16])
        assert loaded["corner"][3] == 0
        assert {"image", "text", "object", "view", "azimuth"} <= set(loaded["columns"])
