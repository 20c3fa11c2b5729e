"""The world as a captioned image folder: what is in a picture, its words, its camera; drawn, rendered, written, resumed.

Record i of a split is a pure function of (seed, split, i), so an interrupted writing goes on where it stopped and a
larger data set begins with the smaller one.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path, read_json, write_json
from sds3d.scene.cameras import CameraOptions, Cameras, sample_cameras
from sds3d.text_to_3d.prompts import margin, view_of
from sds3d.world.shapes import COLOURS, COMPOSED, OBJECTS, RELATIONS, Shape, make_pair, make_shape, noun_phrase

SPLITS = ("train", "validation", "test")
PHRASES = (
    "{thing}",
    "{thing}",
    "{thing}",
    "a picture of {thing}",
    "a render of {thing}",
    "the {bare}",
    "{bare}",
)
VIEW_PHRASES = (
    "{text}, {view} view",
    "{text}, {view} view",
    "{text}, {view} view",
    "{view} view of {text}",
    "{text} from the {view}",
)
SIMPLE = (
    "cube",
    "sphere",
    "cylinder",
    "cone",
    "pyramid",
    "torus",
    "capsule",
    "mug",
)  # what pairs are made of
COLOUR_JITTER = 0.03


@dataclass(frozen=True)
class WorldOptions:
    """What is written: image counts a split, share of pairs, share of captions without the view, held-out margin."""

    train: int = 20000
    validation: int = 1000
    test: int = 2000
    seed: int = 0
    pairs: float = 0.15
    drop_view: float = 0.25
    view_margin: float = (
        7.5  # degrees: nearer to a boundary between views, the caption and the label name none
    )
    hold_out: bool = (
        True  # false shows every combination in every split: a judge that grades them all must have seen them
    )
    random_light: bool = (
        False  # lights turned at random about z: augmentation for a judge, never for a teacher
    )
    supersample: int = 2
    geometry: bool = False  # depth and normals too
    resolution: int = 64  # pixels a side
    camera: CameraOptions = field(default_factory=CameraOptions)

    def __post_init__(self) -> None:
        for name in ("pairs", "drop_view"):
            if not 0 <= (value := vars(self)[name]) <= 1:
                raise UserError(f"{name} is {value}: a share between 0 and 1 is expected")
        if min(self.train, self.validation, self.test) < 0 or self.supersample < 1:
            raise UserError("image counts must not be negative and supersample must be at least 1")


def held_out(name: str, colour: str) -> bool:
    """Whether the training split never shows this object in this colour: one colour an object."""
    return list(COLOURS).index(colour) == (3 * OBJECTS.index(name) + 1) % len(COLOURS)


def _choose_colour(name: str, want_held_out: bool | None, rng: np.random.Generator) -> str:
    return str(
        rng.choice([c for c in COLOURS if want_held_out is None or held_out(name, c) == want_held_out])
    )


def _caption(thing: str, view: str | None, options: WorldOptions, rng: np.random.Generator) -> str:
    text = str(rng.choice(PHRASES)).format(thing=thing, bare=thing.split(" ", 1)[1])
    dropped = rng.random() < options.drop_view
    return text if view is None or dropped else str(rng.choice(VIEW_PHRASES)).format(text=text, view=view)


def draw(options: WorldOptions, split: str, index: int) -> dict[str, Any]:
    """Row `index` of a split, camera included: half of validation and test are combinations that training never shows."""
    rng = np.random.default_rng([options.seed, SPLITS.index(split), index])
    pair = bool(rng.random() < options.pairs)
    fresh = split != "train" and not pair and bool(rng.random() < 0.5)
    names = [str(n) for n in (rng.choice(SIMPLE, 2) if pair else rng.choice(OBJECTS, 1))]
    colours = [_choose_colour(name, fresh if options.hold_out else None, rng) for name in names]
    relation = str(rng.choice(RELATIONS)) if pair else None
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    camera = sample_cameras(options.camera, 1, options.resolution, generator)
    azimuth, elevation = float(camera.azimuth), float(camera.elevation)
    view = view_of(azimuth, elevation) if margin(azimuth, elevation) >= options.view_margin else None
    things = [noun_phrase(colour, name) for colour, name in zip(colours, names, strict=True)]
    has_front = not pair and (names[0] not in COMPOSED or COMPOSED[names[0]][1])
    return {
        "file_name": f"{index:06d}.png",
        "text": _caption(f" {relation} ".join(things), view, options, rng),
        "object": names[0],
        "colour": colours[0],
        "relation": relation or "",  # empty, not null: `datasets` cannot tell the type of a column of nulls
        "second_object": names[1] if pair else "",
        "second_colour": colours[1] if pair else "",
        "view": view or "",
        "has_front": has_front,
        "held_out": not pair and held_out(names[0], colours[0]),
        "azimuth": round(azimuth, 3),
        "elevation": round(elevation, 3),
        "seed": int(rng.integers(2**31)),
        "_camera": camera,
    }


def _shape_of(row: dict[str, Any], rng: np.random.Generator) -> tuple[Shape, np.ndarray]:
    """The shape of a row and its face colours, jittered a little."""

    def paint(colour: str) -> np.ndarray:
        return np.clip(np.array(COLOURS[colour]) + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3), 0, 1)

    first = make_shape(row["object"])
    colour = paint(row["colour"])
    if not row["relation"]:
        return first, first.albedo(colour)
    pair = make_pair(
        first, row["relation"], make_shape(row["second_object"]), (colour, paint(row["second_colour"]))
    )
    return pair, pair.accents


_CASTERS: dict[str, Any] = {}  # one acceleration structure a single object, kept by each worker


def _caster(shape: Shape, keep: bool) -> Any:
    from sds3d.world.raycast import RayCaster

    if not keep:
        return RayCaster(shape.mesh)
    if shape.name not in _CASTERS:
        _CASTERS[shape.name] = RayCaster(shape.mesh)
    return _CASTERS[shape.name]


def _write_block(job: tuple[WorldOptions, str, int, int, str]) -> list[dict[str, Any]]:
    """Rows first..last of a split, rendered where the image is not there yet."""
    from sds3d.world.raycast import render

    options, split, first, last, folder = job
    rows, geometry = [], []
    missing_geometry = options.geometry and not _geometry_holds(
        _geometry_path(folder, split, first), last - first
    )
    for index in range(first, last):
        row = draw(options, split, index)
        camera: Cameras = row.pop("_camera")
        path = Path(folder) / split / row["file_name"]
        if missing_geometry or not path.exists():
            rng = np.random.default_rng(row["seed"])
            shape, albedo = _shape_of(row, rng)
            turn = rng.uniform(0, 2 * np.pi) if options.random_light else 0.0
            view = render(_caster(shape, not row["relation"]), albedo, camera, options.supersample, turn)
            with atomic_path(path) as temporary:
                Image.fromarray((view.rgba * 255 + 0.5).astype(np.uint8), "RGBA").save(temporary)
            geometry.append((view.depth, view.normal))
        rows.append(row)
    if missing_geometry:
        _write_geometry(_geometry_path(folder, split, first), geometry)
    return rows


def _geometry_path(folder: str, split: str, first: int) -> Path:
    return Path(folder) / "geometry" / f"{split}-{first:06d}.safetensors"


def _geometry_holds(path: Path, count: int) -> bool:
    """Whether a block is written whole; the last one of a smaller world is not."""
    from safetensors import safe_open

    if not path.exists():
        return False
    with safe_open(path, "np") as tensors:
        return tensors.get_slice("depth").get_shape()[0] == count


def _write_geometry(path: Path, geometry: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """depth (N, H, W) float16 and normal (N, H, W, 3) int8 (times 127) of a block of images."""
    from safetensors.numpy import save_file

    depth = np.stack([d for d, _ in geometry]).astype(np.float16)
    normal = np.round(np.stack([n for _, n in geometry]) * 127).astype(np.int8)
    with atomic_path(path) as temporary:
        save_file({"depth": depth, "normal": normal}, temporary)


def _claim(folder: Path, options: WorldOptions) -> None:
    """Take the folder for these options, or for a continuation with other counts, or with geometry where it had none."""
    path = folder / "world.json"
    now = json.loads(json.dumps(asdict(options)))
    if path.exists():
        before = read_json(path)
        added = not before.get("geometry")
        changed = [
            k for k in now if k not in SPLITS and before.get(k) != now[k] and not (k == "geometry" and added)
        ]
        if changed:
            raise UserError(
                f"{folder} holds a world with another {changed[0]} ({before.get(changed[0])}): choose another folder"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no world: choose another folder")
    write_json(path, now)


def _jobs(
    options: WorldOptions, folder: Path, block: int
) -> Iterator[tuple[WorldOptions, str, int, int, str]]:
    counts = {"train": options.train, "validation": options.validation, "test": options.test}
    for split, count in counts.items():
        for first in range(0, count, block):
            yield options, split, first, min(first + block, count), str(folder)


def make_world(folder: Path | str, options: WorldOptions, workers: int = 2, block: int = 200) -> None:
    """Write the world to `folder`/{train,validation,test}, each with PNGs (RGBA) and a metadata.jsonl.

    Resumes an interrupted writing; raises `UserError` when the folder holds something else or no worker is given.
    """
    import multiprocessing

    from tqdm import tqdm

    folder = Path(folder)
    if workers < 1:
        raise UserError(f"workers is {workers}: at least 1 process must write the world")
    _claim(folder, options)
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    jobs = list(_jobs(options, folder, block))
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    bar = tqdm(total=sum(job[3] - job[2] for job in jobs), desc="world", unit="image")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, bar:
        for job, block_rows in zip(jobs, pool.map(_write_block, jobs), strict=True):
            rows[job[1]] += block_rows
            bar.update(len(block_rows))
    for split, split_rows in rows.items():
        if split_rows:
            with atomic_path(folder / split / "metadata.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in split_rows), encoding="utf-8")
