"""The world's records, captions and folders."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
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
from distill.teacher.vocabulary import phrase
from sds3d.scene.cameras import CameraOptions
from sds3d.text_to_3d.prompts import VIEWS, margin, view_of
from sds3d.world import world
from sds3d.world.shapes import COLOURS, OBJECTS, RELATIONS, make_shape
from sds3d.world.world import SIMPLE, WorldOptions, draw, held_out, make_world

OPTIONS = WorldOptions()
SMALL = WorldOptions(
    train=6, validation=2, test=3, seed=2, pairs=0.4, camera=CameraOptions(resolution=16)
)  # a pair in each split
BLOCK = 4
READ = """
import json, sys
from datasets import load_dataset
for folder, cache in zip(sys.argv[1::2], sys.argv[2::2]):
    data = load_dataset("imagefolder", data_dir=folder, cache_dir=cache)
    row = data["train"][1]
    print(json.dumps({"counts": {k: len(v) for k, v in data.items()}, "text": row["text"], "mode": row["image"].mode,
                      "size": row["image"].size, "corner": row["image"].getpixel((0, 0)), "columns": data["train"].column_names}))
"""


class InProcess:
    """Stands for the pool of workers, so that most tests start none."""

    def __init__(self, workers: int, mp_context: object) -> None:
        assert workers == 1

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def map(self, work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        return map(work, jobs)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "ProcessPoolExecutor", InProcess)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world, written by two worker processes, geometry with it."""
    folder = tmp_path_factory.mktemp("world") / "small"
    make_world(folder, replace(SMALL, geometry=True), workers=2, block=BLOCK)
    return folder


def _bytes(folder: Path, without: str = "") -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: content for name, content in named.items() if not (without and re.match(without, name))}


@lru_cache
def _rows(split: str, count: int) -> list[dict[str, Any]]:
    return [draw(OPTIONS, split, index) for index in range(count)]


def _combinations(rows: Iterable[dict[str, Any]]) -> set[tuple[str, str]]:
    rows = list(rows)
    second = {(row["second_object"], row["second_colour"]) for row in rows if row["relation"]}
    return {(row["object"], row["colour"]) for row in rows} | second


def _view_told(text: str) -> str | None:
    told = [
        v
        for v in VIEWS
        if text.endswith((f", {v} view", f" from the {v}")) or text.startswith(f"{v} view of ")
    ]
    return told[0] if told else None


def test_a_record_is_a_function_of_seed_split_and_index() -> None:
    state = torch.get_rng_state()
    camera = draw(OPTIONS, "test", 7)["_camera"]
    assert torch.get_rng_state().equal(state), "the global generator is left alone"
    rows = [
        {**draw(options, "test", 7), "_camera": None}
        for options in (OPTIONS, replace(OPTIONS, train=3, test=9))
    ]
    assert rows[0] == rows[1] == {**_rows("test", 10)[7], "_camera": None}
    assert camera.position.equal(_rows("test", 10)[7]["_camera"].position)
    others = [
        draw(replace(OPTIONS, seed=1), "test", 7),
        draw(OPTIONS, "validation", 7),
        draw(OPTIONS, "test", 8),
    ]
    assert len({row["seed"] for row in (*others, rows[0])}) == 4


def test_every_object_has_one_held_out_colour() -> None:
    assert all(sum(held_out(name, colour) for colour in COLOURS) == 1 for name in OBJECTS)
    assert len({colour for name in OBJECTS for colour in COLOURS if held_out(name, colour)}) == len(COLOURS)


def test_training_shows_all_but_the_held_out_combinations() -> None:
    shown = _combinations(_rows("train", 3000))
    assert shown == {(name, colour) for name in OBJECTS for colour in COLOURS if not held_out(name, colour)}
    assert not any(row["held_out"] for row in _rows("train", 3000))


def test_a_judge_may_be_shown_every_combination() -> None:
    rows = [draw(replace(OPTIONS, hold_out=False, pairs=0.0), "train", index) for index in range(3000)]
    assert {(row["object"], row["colour"]) for row in rows} == {
        (name, colour) for name in OBJECTS for colour in COLOURS
    }
    assert all(row["held_out"] == held_out(row["object"], row["colour"]) for row in rows)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_half_of_the_graded_objects_are_held_out(split: str) -> None:
    single = [row for row in _rows(split, 1500) if not row["relation"]]
    assert np.mean([row["held_out"] for row in single]) == pytest.approx(0.5, abs=0.05)
    assert all(row["held_out"] == held_out(row["object"], row["colour"]) for row in single)
    held = _combinations(row for row in single if row["held_out"])
    assert {name for name, _ in held} == set(OBJECTS)


def test_pairs_are_simple_and_as_frequent_as_asked() -> None:
    pairs = [row for row in _rows("train", 3000) if row["relation"]]
    assert len(pairs) / 3000 == pytest.approx(OPTIONS.pairs, abs=0.02)
    assert {row["relation"] for row in pairs} == set(RELATIONS)
    assert {row["object"] for row in pairs} == {row["second_object"] for row in pairs} == set(SIMPLE)
    assert not any(
        row["relation"] for row in (draw(replace(OPTIONS, pairs=0), "train", i) for i in range(50))
    )
    assert all(row["relation"] for row in (draw(replace(OPTIONS, pairs=1), "train", i) for i in range(50)))


def test_captions_tell_what_is_drawn_with_the_right_article() -> None:
    for row in _rows("train", 3000):
        things = [f"{row['colour']} {row['object']}"]
        if row["relation"]:
            things.append(f"{row['relation']} {phrase(row['second_colour'], row['second_object'])}")
        assert " ".join(things) in row["text"], row["text"]
        assert all(
            (article == "an") == (word[0] in "aeiou")
            for article, word in re.findall(r"\b(an?) (\w+)", row["text"])
        )
    assert phrase("orange", "car") == "an orange car" and phrase("red", "car") == "a red car"


def test_views_are_told_by_the_rule_and_dropped_as_often_as_asked() -> None:
    rows = _rows("train", 3000)
    for row in rows:
        azimuth, elevation = row["azimuth"], row["elevation"]
        if abs(margin(azimuth, elevation) - OPTIONS.view_margin) > 1e-2:  # angles are rounded in the row
            clear = margin(azimuth, elevation) > OPTIONS.view_margin
            assert row["view"] == (view_of(azimuth, elevation) if clear else "")
        assert _view_told(row["text"]) in (None, row["view"] or None)
    named = [row for row in rows if row["view"]]
    assert {row["view"] for row in named} == set(VIEWS) and len(named) < 0.9 * len(rows)
    dropped = np.mean([_view_told(row["text"]) is None for row in named])
    assert dropped == pytest.approx(OPTIONS.drop_view, abs=0.03)


def test_fronts_are_those_of_the_shapes() -> None:
    for row in _rows("train", 300):
        assert row["has_front"] == (not row["relation"] and make_shape(row["object"]).has_front)


@pytest.mark.parametrize(
    "changes",
    [{"pairs": 1.5}, {"drop_view": -0.1}, {"train": -1}, {"supersample": 0}, {"pairs": float("nan")}],
)
def test_impossible_options_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(UserError):
        WorldOptions(**changes)


def test_images_lie_beside_their_rows(written: Path) -> None:
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        lines = (written / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        expected = [draw(SMALL, split, index) for index in range(count)]
        assert [json.loads(line) for line in lines] == [
            {k: v for k, v in row.items() if k != "_camera"} for row in expected
        ]
        names = sorted(path.name for path in (written / split).iterdir())
        assert names == sorted([row["file_name"] for row in expected] + ["metadata.jsonl"])
        for row in expected:
            image = Image.open(written / split / row["file_name"])
            assert (image.mode, image.size) == ("RGBA", (16, 16))
            assert image.getpixel((0, 0))[3] == 0 and np.asarray(image)[..., 3].mean() > 10


def test_a_picture_shows_the_colour_it_names(tmp_path: Path, in_process: None) -> None:
    options = replace(SMALL, train=8, validation=0, test=0, pairs=0, camera=CameraOptions(resolution=32))
    make_world(tmp_path / "w", options, workers=1)
    for line in (tmp_path / "w" / "train" / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pixels = np.asarray(Image.open(tmp_path / "w" / "train" / row["file_name"])).reshape(-1, 4) / 255
        pixels = pixels[pixels[:, 3] == 1][:, :3]
        colour = np.array(COLOURS[row["colour"]])
        hue = pixels / np.linalg.norm(pixels, axis=1, keepdims=True) @ (colour / np.linalg.norm(colour))
        assert (hue > 0.99).mean() > 0.1, row["text"]


def test_the_number_of_workers_changes_nothing(written: Path, tmp_path: Path, in_process: None) -> None:
    make_world(tmp_path / "again", SMALL, workers=1)  # another block size, and no geometry
    assert _bytes(tmp_path / "again", "world.json") == _bytes(written, "world.json|geometry/")
    make_world(tmp_path / "other", replace(SMALL, seed=5), workers=1)
    assert _bytes(tmp_path / "other")["train/000000.png"] != _bytes(written)["train/000000.png"]


def test_light_turned_at_random_changes_colours_not_outlines(
    written: Path, tmp_path: Path, in_process: None
) -> None:
    make_world(tmp_path / "lit", replace(SMALL, train=3, validation=0, test=0, random_light=True), workers=1)
    for name in ("000000.png", "000001.png", "000002.png"):
        lit, plain = (
            np.asarray(Image.open(folder / "train" / name)) for folder in (tmp_path / "lit", written)
        )
        assert (lit[..., 3] == plain[..., 3]).all() and (lit[..., :3] != plain[..., :3]).any()


def test_an_interrupted_writing_is_taken_up(tmp_path: Path, in_process: None) -> None:
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
    kept = (folder / "train" / "000002.png").stat().st_mtime_ns
    make_world(folder, options, workers=1, block=BLOCK)
    assert _bytes(folder) == before
    assert (folder / "train" / "000002.png").stat().st_mtime_ns == kept, "what is there is not rendered again"


def test_a_world_grows_into_the_larger_one(written: Path, tmp_path: Path, in_process: None) -> None:
    folder, options = tmp_path / "w", replace(SMALL, geometry=True)
    make_world(folder, replace(options, train=2, test=0), workers=1, block=BLOCK)
    make_world(folder, options, workers=1, block=BLOCK)
    assert _bytes(folder) == _bytes(written)


def test_another_world_in_the_same_folder_is_refused(written: Path) -> None:
    before = _bytes(written)
    for options, word in ((SMALL, "geometry"), (replace(SMALL, geometry=True, seed=1), "seed")):
        with pytest.raises(UserError, match=word):
            make_world(written, options, workers=1)
    assert _bytes(written) == before


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="not empty"):
        make_world(tmp_path, SMALL, workers=1)
    assert _bytes(tmp_path) == {"thesis.txt": b"mine"}


def test_no_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers"):
        make_world(tmp_path / "w", SMALL, workers=0)
    assert not (tmp_path / "w").exists()


def test_geometry_agrees_with_the_images(written: Path) -> None:
    blocks = {"train": [0, 4], "validation": [0], "test": [0]}
    for split, firsts in blocks.items():
        parts = [load_file(written / "geometry" / f"{split}-{first:06d}.safetensors") for first in firsts]
        depth, normal = (np.concatenate([part[key] for part in parts]) for key in ("depth", "normal"))
        images = [Image.open(path) for path in sorted((written / split).glob("*.png"))]
        seen = np.stack([np.asarray(image)[..., 3] for image in images]) > 0
        assert depth.shape == seen.shape and depth.dtype == np.float16
        assert normal.shape == (*seen.shape, 3) and normal.dtype == np.int8
        np.testing.assert_array_equal(depth > 0, seen)
        assert depth[seen].min() > 2.75 - 0.9 and depth.max() < 3.25 + 0.9
        length = np.linalg.norm(normal.astype(np.float32) / 127, axis=-1)
        assert (np.abs(length[seen] - 1) < 0.02).all() and (length[~seen] == 0).all()
    assert len(list((written / "geometry").iterdir())) == 4


@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_no_column_is_ever_null(pairs: float) -> None:
    """`datasets` cannot tell the type of a column of nulls, and a judge's world has no pairs."""
    for i in range(40):
        assert None not in draw(replace(OPTIONS, pairs=pairs), "train", i).values()


@pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed (pip install datasets)")
def test_datasets_reads_the_folder(written: Path, tmp_path: Path, in_process: None) -> None:
    """As the ecosystem sees it: with geometry beside the images, and without, a killed writer's leftover in it."""
    make_world(tmp_path / "plain", SMALL, workers=1)
    (tmp_path / "plain" / "train" / ".000001.123.png").write_bytes(b"torn")
    places = {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    folders = [str(path) for path in (written, tmp_path / "cache1", tmp_path / "plain", tmp_path / "cache2")]
    done = subprocess.run(
        [sys.executable, "-c", READ, *folders], env={**os.environ, **places}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    row = draw(SMALL, "train", 1)
    for line in done.stdout.splitlines()[-2:]:
        seen = json.loads(line)
        assert seen["counts"] == {"train": 6, "validation": 2, "test": 3}
        assert (seen["text"], seen["mode"], seen["size"], seen["corner"][3]) == (
            row["text"],
            "RGBA",
            [16, 16],
            0,
        )
        assert {"image", "text", "object", "view", "azimuth"} <= set(seen["columns"])
