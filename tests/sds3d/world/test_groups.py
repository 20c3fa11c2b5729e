"""Groups of views: rows of earlier versions, poses, assemblies among the rows, folders."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.runtime.errors import UserError
from distill.runtime.files import read_json, write_json
from sds3d.world.assemblies import UNSEEN
from sds3d.world.world import SPLITS, WorldOptions, make_world, sample_group, sample_row

OPTIONS = WorldOptions()
GROUPED = WorldOptions(train=4800, validation=800, test=800, views=8, assemblies=0.35, pairs=0.2)
SMALL = WorldOptions(8, 4, 4, seed=1, views=4, assemblies=0.5, resolution=16)
NEW = ("pose", "group", "assembly")
# Of the first 200 rows of each split, by the version before these columns (de7d13f).
EARLIER = "6c1027940b3e44de6684d2047a55e4e775d5f6705d455c09c2a9a28bd3b815d1"
SHARED = ("object", "colour", "relation", "second_object", "second_colour", "has_front", "held_out", "seed")


def _rows(options: WorldOptions, split: str, groups: int) -> list[list[dict[str, Any]]]:
    return [[row for row, _ in sample_group(options, split, group)] for group in range(groups)]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _old(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in NEW}


def test_rows_of_single_views_are_those_of_earlier_versions() -> None:
    rows = [sample_row(OPTIONS, split, index)[0] for split in SPLITS for index in range(200)]
    text = "\n".join(json.dumps(_old(row)) for row in rows)
    assert hashlib.sha256(text.encode()).hexdigest() == EARLIER
    assert [row["group"] for row in rows] == [*range(200)] * 3
    assert {row["assembly"] for row in rows} == {-1}


def test_the_first_view_of_a_group_is_the_row_of_a_single_view() -> None:
    single, grouped = replace(OPTIONS, pairs=0.2), replace(GROUPED, assemblies=0.0)
    for group in range(30):
        first = sample_group(grouped, "test", group)[0][0]
        row = sample_row(single, "test", group)[0]
        assert {**first, "file_name": ""} == {**row, "file_name": ""}


def test_rows_of_a_group_share_the_object_but_not_the_camera() -> None:
    for group, rows in enumerate(_rows(GROUPED, "train", 60)):
        assert [row["file_name"] for row in rows] == [f"{8 * group + view:06d}.png" for view in range(8)]
        assert {row["group"] for row in rows} == {group}
        for key in (*SHARED, "assembly"):
            assert len({row[key] for row in rows}) == 1, key
        assert len({tuple(row["pose"]) for row in rows}) == 8
        assert (len({row["text"] for row in rows}) > 1) == (rows[0]["assembly"] < 0)
        assert rows[3] == sample_row(GROUPED, "train", 8 * group + 3)[0]


def test_cameras_of_later_views_have_the_same_distribution() -> None:
    angles = np.array(
        [[row["azimuth"], row["elevation"]] for rows in _rows(GROUPED, "train", 200) for row in rows]
    )
    assert angles[:, 0].min() < -175 and angles[:, 0].max() > 175 and abs(angles[:, 0].mean()) < 10
    assert (
        angles[:, 1].min() >= -10
        and angles[:, 1].max() <= 80
        and angles[:, 1].mean() == pytest.approx(35, abs=3)
    )
    by_view = angles[:, 0].reshape(200, 8)
    assert np.abs(np.corrcoef(by_view.T) - np.eye(8)).max() < 0.3, "views are independent"


@pytest.mark.parametrize("index", range(6))
def test_pose_is_the_origin_seen_by_the_rays(index: int) -> None:
    """Projected by the rays of a fine image: the pixel whose ray passes nearest to the origin."""
    row, camera = sample_row(GROUPED, "train", index)
    size = 500
    origins, directions = (rays[0].double() for rays in camera.with_resolution(size).rays())
    centre = directions[size // 2 - 1 : size // 2 + 1, size // 2 - 1 : size // 2 + 1].mean((0, 1))
    forward = (centre / centre.norm()).numpy()
    position = origins[0, 0]
    cosine = directions @ (-position / position.norm())
    line, column = divmod(int(cosine.argmax()), size)
    right, up = (column + 0.5) / size * 2 - 1, 1 - (line + 0.5) / size * 2
    azimuth, elevation, distance, *offset = row["pose"]
    expected = np.arctan2(-forward[1], -forward[0])
    assert np.cos(azimuth - expected) == pytest.approx(1, abs=1e-6)
    assert elevation == pytest.approx(np.arcsin(-forward[2]), abs=1e-4)
    assert distance == pytest.approx(float(-position.numpy() @ forward), abs=1e-4)
    np.testing.assert_allclose(offset, [right, up], atol=2 / size)
    assert row["pose"] == [round(value, 5) for value in row["pose"]]
    assert np.rad2deg([azimuth, elevation]).tolist() == pytest.approx(
        [row["azimuth"], row["elevation"]], abs=2e-3
    )


def test_assemblies_have_no_name_and_leave_named_groups_unchanged() -> None:
    mixed, named = _rows(GROUPED, "train", 300), _rows(replace(GROUPED, assemblies=0.0), "train", 300)
    assert np.mean([rows[0]["assembly"] >= 0 for rows in mixed]) == pytest.approx(0.35, abs=0.08)
    for rows, plain in zip(mixed, named, strict=True):
        assert [list(row) for row in rows] == [list(row) for row in plain]
        assert [[type(value) for value in row.values()] for row in rows] == [
            [type(value) for value in row.values()] for row in plain
        ]
        if rows[0]["assembly"] < 0:
            assert rows == plain
            continue
        for row in rows:
            assert not any(row[key] for key in ("text", "object", "colour", "relation", "view", "has_front"))
            assert not any(row[key] for key in ("second_object", "second_colour", "held_out"))
    assert all(rows[0]["assembly"] >= 0 for rows in _rows(replace(GROUPED, assemblies=1.0), "test", 20))


def test_no_split_has_assemblies_of_another_or_the_held_out_ones() -> None:
    options = replace(GROUPED, views=1, assemblies=1.0)
    seeds = {
        split: {sample_row(options, split, index)[0]["assembly"] for index in range(1500)} for split in SPLITS
    }
    assert not seeds["train"] & seeds["validation"] and not seeds["train"] & seeds["test"]
    assert not seeds["validation"] & seeds["test"]
    assert max(max(values) for values in seeds.values()) < 1_000_000 <= min(UNSEEN)
    assert len(seeds["train"]) > 1490


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"views": 0}, "views is 0"),
        ({"views": 7}, r"train is 48000.*multiple of views \(7\)"),
        ({"views": 8, "test": 2001}, "test is 2001.*2000"),
        ({"assemblies": 1.2}, "assemblies is 1.2"),
        ({"assemblies": float("nan")}, "assemblies"),
    ],
)
def test_options_out_of_range_raise(changes: dict[str, float], match: str) -> None:
    with pytest.raises(UserError, match=match):
        WorldOptions(**changes)


def test_interrupted_groups_resume(tmp_path: Path, in_process: None) -> None:
    folder, options = tmp_path / "w", replace(SMALL, geometry=True, random_light=True)
    make_world(folder, options, workers=1, block=6)  # blocks of 4: whole groups
    before = _bytes(folder)
    assert len([name for name in before if name.endswith(".png")]) == 16
    for name in ("train/000001.png", "train/000006.png", "test/000003.png", "train/metadata.jsonl"):
        (folder / name).unlink()
    time = (folder / "train" / "000002.png").stat().st_mtime_ns
    make_world(folder, options, workers=1, block=3)
    assert _bytes(folder) == before
    assert (folder / "train" / "000002.png").stat().st_mtime_ns == time
    rows = [json.loads(line) for line in (folder / "train" / "metadata.jsonl").read_text().splitlines()]
    assert [row["group"] for row in rows] == [0] * 4 + [1] * 4


def test_folders_of_earlier_versions_gain_the_columns(tmp_path: Path, in_process: None) -> None:
    options = WorldOptions(3, 0, 0, resolution=16)
    make_world(tmp_path / "w", options, workers=1)
    path = tmp_path / "w" / "world.json"
    values = read_json(path)
    write_json(path, {key: value for key, value in values.items() if key not in ("views", "assemblies")})
    with pytest.raises(UserError, match="another views"):
        make_world(tmp_path / "w", replace(options, views=3), workers=1)
    make_world(tmp_path / "w", options, workers=1)
    assert read_json(path) == values


def test_images_of_a_group_differ_and_are_reproducible(tmp_path: Path, in_process: None) -> None:
    state = torch.get_rng_state()
    for name in ("one", "two"):
        make_world(tmp_path / name, replace(SMALL, assemblies=1.0), workers=1)
    assert torch.get_rng_state().equal(state)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")
    images = [value for key, value in _bytes(tmp_path / "one").items() if key.endswith(".png")]
    assert len(set(images)) == len(images) == 16
