"""The world as a captioned image folder: objects, captions and cameras are sampled, rendered and written.

Row i of a split is view i % views of group i // views: all rows of a group show one object in the same
colours. A group is a pure function of (seed, split, its index): an interrupted run resumes where it stopped,
and a larger data set begins with the smaller one.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from distill.runtime.config import as_mapping
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path, read_json, write_json
from sds3d.scene.cameras import CameraOptions, Cameras, sample_cameras
from sds3d.text_to_3d.prompts import margin, view_of
from sds3d.world.assemblies import make_assembly
from sds3d.world.shapes import (
    COLOURS,
    COMPOSED,
    OBJECTS,
    RELATIONS,
    Shape,
    make_pair,
    make_shape,
    noun_phrase,
)

if TYPE_CHECKING:
    from sds3d.world.raycast import RayCaster, Render

SPLITS = ("train", "validation", "test")
PHRASES = (*("{thing}",) * 3, "a picture of {thing}", "a render of {thing}", "the {bare}", "{bare}")
VIEW_PHRASES = (*("{text}, {view} view",) * 3, "{view} view of {text}", "{text} from the {view}")
SIMPLE = ("cube", "sphere", "cylinder", "cone", "pyramid", "torus", "capsule", "mug")  # objects of pairs
COLUMNS = (
    *("text", "object", "colour", "relation", "second_object", "second_colour", "view", "has_front"),
    *("held_out", "azimuth", "elevation", "seed", "pose", "assembly"),
)
COLOUR_JITTER = 0.03
# Ranges of the seeds of assemblies, so that no split has those of another; all lie below `UNSEEN`.
ASSEMBLY_SEEDS = {"train": (0, 900_000), "validation": (900_000, 950_000), "test": (950_000, 1_000_000)}
VIEW_STREAM, ASSEMBLY_STREAM = 1, 2  # keep further random streams of a group apart from its first


@dataclass(frozen=True)
class WorldOptions:
    """The content of the data set. Raises `UserError` for a value out of range."""

    train: int = 48000  # images of each split
    validation: int = 1000
    test: int = 2000
    seed: int = 0
    views: int = 1  # images of each object, in consecutive rows
    assemblies: float = 0.0  # fraction of objects that are assemblies of primitives without name or caption
    pairs: float = 0.15  # fraction of the named objects that are two objects
    drop_view: float = 0.25  # fraction of captions without the view word
    view_margin: float = 7.5  # degrees; nearer to a boundary between views, caption and label name no view
    hold_out: bool = True  # false: every split has all objects in all colours, as a judge's data must
    random_light: bool = False  # lights rotated about z, as augmentation of a judge's data, not a teacher's
    supersample: int = 2  # rays per pixel along each axis
    geometry: bool = False  # also write depth, normals and parts (geometry/*.safetensors)
    resolution: int = 64  # pixels a side
    camera: CameraOptions = field(default_factory=CameraOptions)

    def __post_init__(self) -> None:
        for name in ("pairs", "drop_view", "assemblies"):
            if not 0 <= (value := vars(self)[name]) <= 1:
                raise UserError(f"{name} is {value}: a fraction between 0 and 1 is expected")
        if min(self.train, self.validation, self.test) < 0 or self.supersample < 1 or self.resolution < 8:
            raise UserError(
                "image counts must not be negative, supersample at least 1 and resolution at least 8"
            )
        if self.views < 1:
            raise UserError(f"views is {self.views}: at least 1 image of each object is expected")
        for split in SPLITS:
            if (count := vars(self)[split]) % self.views:
                raise UserError(
                    f"{split} is {count}: a multiple of views ({self.views}) is expected, "
                    f"such as {count - count % self.views}"
                )


def held_out(name: str, colour: str) -> bool:
    """Whether the training split excludes this object in this colour: one colour per object."""
    return list(COLOURS).index(colour) == (3 * OBJECTS.index(name) + 1) % len(COLOURS)


def _choose_colour(name: str, novel: bool | None, rng: np.random.Generator) -> str:
    return str(rng.choice([c for c in COLOURS if novel is None or held_out(name, c) == novel]))


def _caption(thing: str, view: str | None, options: WorldOptions, rng: np.random.Generator) -> str:
    text = str(rng.choice(PHRASES)).format(thing=thing, bare=thing.split(" ", 1)[1])
    dropped = rng.random() < options.drop_view
    return text if view is None or dropped else str(rng.choice(VIEW_PHRASES)).format(text=text, view=view)


def _named(options: WorldOptions, split: str, rng: np.random.Generator) -> dict[str, Any]:
    """Columns of a named object or pair; half of validation and test are held-out combinations."""
    pair = bool(rng.random() < options.pairs)
    novel = split != "train" and not pair and bool(rng.random() < 0.5)
    names = [str(n) for n in (rng.choice(SIMPLE, 2) if pair else rng.choice(OBJECTS, 1))]
    colours = [_choose_colour(name, novel if options.hold_out else None, rng) for name in names]
    return {
        "object": names[0],
        "colour": colours[0],
        # Not null: `datasets` cannot infer the type of a column of nulls.
        "relation": str(rng.choice(RELATIONS)) if pair else "",
        "second_object": names[1] if pair else "",
        "second_colour": colours[1] if pair else "",
        "has_front": not pair and (names[0] not in COMPOSED or COMPOSED[names[0]][1]),
        "held_out": not pair and held_out(names[0], colours[0]),
        "assembly": -1,
    }


def _content(options: WorldOptions, split: str, group: int, rng: np.random.Generator) -> dict[str, Any]:
    """Columns of a group's object. That of a named one does not depend on the fraction of assemblies."""
    named = _named(options, split, rng)
    own_rng = np.random.default_rng([options.seed, SPLITS.index(split), group, ASSEMBLY_STREAM])
    if own_rng.random() >= options.assemblies:
        return named
    empty = dict.fromkeys(("object", "colour", "relation", "second_object", "second_colour"), "")
    seed = int(own_rng.integers(*ASSEMBLY_SEEDS[split]))
    return {**empty, "has_front": False, "held_out": False, "assembly": seed}


def _sample_view(
    options: WorldOptions, content: dict[str, Any], rng: np.random.Generator
) -> tuple[dict[str, Any], Cameras]:
    """Columns of one view of an object, and its camera."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    camera = sample_cameras(options.camera, 1, options.resolution, generator)
    azimuth, elevation = float(camera.azimuth), float(camera.elevation)
    view = view_of(azimuth, elevation) if margin(azimuth, elevation) >= options.view_margin else None
    text = ""
    if content["object"]:
        text = noun_phrase(content["colour"], content["object"])
        if content["relation"]:
            second = noun_phrase(content["second_colour"], content["second_object"])
            text = f"{text} {content['relation']} {second}"
        text = _caption(text, view, options, rng)
    columns = {
        "text": text,
        "view": view or "" if text else "",
        "azimuth": round(azimuth, 3),
        "elevation": round(elevation, 3),
        "pose": [round(value, 5) for value in camera.view_poses()[0].tolist()],
    }
    return columns, camera


def sample_group(options: WorldOptions, split: str, group: int) -> list[tuple[dict[str, Any], Cameras]]:
    """The rows of group `group` of a split and their cameras, one a view."""
    key = [options.seed, SPLITS.index(split), group]
    rng = np.random.default_rng(key)
    content = _content(options, split, group, rng)
    # The first view continues the group's stream: with one view, rows are those of earlier versions.
    rngs = [rng, *(np.random.default_rng([*key, VIEW_STREAM, view]) for view in range(1, options.views))]
    views = [_sample_view(options, content, view_rng) for view_rng in rngs]
    seed = int(rng.integers(2**31))
    return [
        (_row(group * options.views + view, group, {**content, **columns, "seed": seed}), camera)
        for view, (columns, camera) in enumerate(views)
    ]


def _row(index: int, group: int, columns: dict[str, Any]) -> dict[str, Any]:
    """All columns of a row, in the order of the file."""
    return {"file_name": f"{index:06d}.png", **{name: columns[name] for name in COLUMNS}, "group": group}


def sample_row(options: WorldOptions, split: str, index: int) -> tuple[dict[str, Any], Cameras]:
    """Row `index` of a split and its camera."""
    return sample_group(options, split, index // options.views)[index % options.views]


def _shape_of(row: dict[str, Any], rng: np.random.Generator) -> tuple[Shape, np.ndarray]:
    """The shape of a row and the colour (3,) of its faces without accent, slightly jittered."""

    def jittered(colour: str) -> np.ndarray:
        return np.clip(np.array(COLOURS[colour]) + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3), 0, 1)

    if row["assembly"] >= 0:
        return make_assembly(row["assembly"]), np.zeros(3)
    first = make_shape(row["object"])
    colour = jittered(row["colour"])
    if not row["relation"]:
        return first, colour
    colours = (colour, jittered(row["second_colour"]))
    return make_pair(first, row["relation"], make_shape(row["second_object"]), colours), colour


@lru_cache(maxsize=64)
def _single_caster(name: str) -> "RayCaster":
    """The acceleration structure of a single object, built once in each worker."""
    from sds3d.world.raycast import RayCaster

    return RayCaster(make_shape(name).mesh)


def _render_group(
    options: WorldOptions, group: list[tuple[dict[str, Any], Cameras]]
) -> Iterator[tuple[str, "Render", "RayCaster"]]:
    """File names and renders of rows of one group, and what rendered them."""
    from sds3d.world.raycast import RayCaster, render

    row = group[0][0]
    rng = np.random.default_rng(row["seed"])
    shape, colour = _shape_of(row, rng)
    rotation = rng.uniform(0, 2 * np.pi) if options.random_light else 0.0
    caster = _single_caster(shape.name) if row["object"] == shape.name else RayCaster(shape.mesh)
    face_albedo = shape.albedo(colour)

    def pattern_albedo(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
        return shape.colours_at(points, faces, colour)

    albedo = pattern_albedo if shape.patterns else face_albedo
    for row, camera in group:
        yield row["file_name"], render(caster, albedo, camera, options.supersample, rotation), caster


def _write_block(job: tuple[WorldOptions, str, int, int, str]) -> list[dict[str, Any]]:
    """Rows first..last-1 of a split, whole groups, rendered where the image does not exist."""
    options, split, first, last, root = job
    folder, rows, geometry = Path(root) / split, [], []
    geometry_path = Path(root) / "geometry" / f"{split}-{first:06d}.safetensors"
    missing_geometry = options.geometry and not _is_complete(geometry_path, last - first)
    for index in range(first // options.views, last // options.views):
        group = sample_group(options, split, index)
        rows += [row for row, _ in group]
        missing = [v for v in group if missing_geometry or not (folder / v[0]["file_name"]).exists()]
        if not missing:
            continue
        for name, view, caster in _render_group(options, missing):
            with atomic_path(folder / name) as temporary:
                Image.fromarray((view.rgba * 255 + 0.5).astype(np.uint8), "RGBA").save(temporary)
            if missing_geometry:
                geometry.append((view.depth, view.normal, caster.parts[view.face]))
    if missing_geometry:
        _write_geometry(geometry_path, geometry)
    return rows


def _is_complete(path: Path, count: int) -> bool:
    """Whether a block of geometry exists with all images; the last one of a smaller world has fewer."""
    from safetensors import safe_open

    if not path.exists():
        return False
    with safe_open(path, "np") as tensors:
        if "part" not in tensors.keys():  # noqa: SIM118 (safetensors' file is no mapping): of an earlier version
            return False
        return tensors.get_slice("depth").get_shape()[0] == count


def _write_geometry(path: Path, geometry: Sequence[tuple[np.ndarray, ...]]) -> None:
    """depth (N, H, W) float16, normal (N, H, W, 3) int8 (times 127) and part (N, H, W) uint8 of a block."""
    from safetensors.numpy import save_file

    depth, normal, part = (np.stack(list(values)) for values in zip(*geometry, strict=True))
    half, eighth = depth.astype(np.float16), np.round(normal * 127).astype(np.int8)
    with atomic_path(path) as temporary:
        save_file({"depth": half, "normal": eighth, "part": part}, temporary)


def _claim(folder: Path, options: WorldOptions) -> None:
    """Reserve the folder for these options; image counts may change, and geometry may be added."""
    path = folder / "world.json"
    values = as_mapping(options)
    if path.exists():
        before = read_json(path)
        if "resolution" in before.get("camera", {}):  # where worlds of earlier versions have it
            before["resolution"] = before["camera"].pop("resolution")
        before = {"views": 1, "assemblies": 0.0, **before}  # which worlds of earlier versions lack
        variable = SPLITS if before.get("geometry") else (*SPLITS, "geometry")
        changed = [key for key in values if key not in variable and before.get(key) != values[key]]
        if changed:
            raise UserError(
                f"{folder} holds a world with another {changed[0]} ({before.get(changed[0])}): "
                "choose another folder"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no world: choose another folder")
    write_json(path, values)


def _jobs(
    options: WorldOptions, folder: Path, block: int
) -> Iterator[tuple[WorldOptions, str, int, int, str]]:
    block = max(block // options.views, 1) * options.views  # whole groups
    counts = {"train": options.train, "validation": options.validation, "test": options.test}
    for split, count in counts.items():
        for first in range(0, count, block):
            yield options, split, first, min(first + block, count), str(folder)


def make_world(folder: Path | str, options: WorldOptions, workers: int = 2, block: int = 200) -> None:
    """Write the world to `folder`/{train,validation,test}, each with PNGs (RGBA) and a metadata.jsonl.

    An interrupted call resumes. Raises `UserError` for a folder with other content, and for no workers.
    """
    import multiprocessing

    from tqdm import tqdm

    folder = Path(folder)
    if workers < 1:
        raise UserError(f"workers is {workers}: at least 1 process is needed")
    _claim(folder, options)
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    jobs = list(_jobs(options, folder, block))
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    bar = tqdm(total=sum(job[3] - job[2] for job in jobs), desc="world", unit="image")
    # One thread each: those of several workers would wait for each other (3.7 times slower on two cores).
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool, bar:
        for job, block_rows in zip(jobs, pool.map(_write_block, jobs), strict=True):
            rows[job[1]] += block_rows
            bar.update(len(block_rows))
    for split, split_rows in rows.items():
        if split_rows:
            with atomic_path(folder / split / "metadata.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in split_rows), encoding="utf-8")
