"""What a benchmark is given: prompts about the world and pictures of its objects, with their true shapes."""

import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path
from sds3d.scene.cameras import Cameras
from sds3d.text_to_3d.alignment import picture_camera
from sds3d.world.assemblies import UNSEEN, make_assembly
from sds3d.world.raycast import Albedo, RayCaster, render
from sds3d.world.shapes import COLOURS, OBJECTS, RELATIONS, Shape, make_pair, make_shape, noun_phrase
from sds3d.world.world import held_out

TINY = ("a red teapot", "a blue torus", "a green duck", "a yellow chair", "a purple car")
PAIRS = (
    "a red sphere on top of a blue cube",
    "a green cone next to a yellow cylinder",
    "a purple cube in front of an orange torus",
)
# To choose a recipe by: none of the full suite's, and seeds apart from those that are reported.
QUICK = (
    *("a blue teapot", "a green chair", "an orange car", "a yellow duck"),
    *("a red cube", "a purple table", "a pink bunny", "a yellow sphere on top of a green cylinder"),
)
QUICK_SEED = 100
PICTURE, ASSEMBLY = "picture of ", "assembly "  # begin the names of pictures, and of unnamed shapes
PICTURE_ELEVATION = (10.0, 40.0)  # degrees, of the cameras of pictures
PICTURE_SIDE = 256  # pixels
SuiteName = Literal["tiny", "quick", "full", "images"]


def full_suite() -> tuple[str, ...]:
    """The tiny suite, every other object (a third of them in a held-out colour), and the pairs."""
    colours = list(COLOURS)
    tiny = {prompt.rsplit(" ", 1)[1] for prompt in TINY}
    rest = [name for name in OBJECTS if name not in tiny]
    first = [
        next(c for c in colours if held_out(name, c) == (i % 3 == 0) and c != colours[i % 2])
        for i, name in enumerate(rest)
    ]
    cycled = [colours[i % len(colours)] if i % 3 else colour for i, colour in enumerate(first)]
    return (*TINY, *(noun_phrase(colour, name) for name, colour in zip(rest, cycled, strict=True)), *PAIRS)


def picture_suite() -> tuple[str, ...]:
    """Pictures of every named object, in the colours of the full suite, and of the unseen assemblies."""
    singles = [prompt for prompt in full_suite() if prompt not in PAIRS]
    return (*(PICTURE + prompt for prompt in singles), *(f"{PICTURE}{ASSEMBLY}{seed}" for seed in UNSEEN))


@dataclass(frozen=True)
class Suite:
    """Subjects by name, and the seeds that each is made with."""

    names: tuple[str, ...]
    seeds: tuple[int, ...]


def suite_of(name: SuiteName, count: int | None = None, names: tuple[str, ...] | None = None) -> Suite:
    """A suite by name; `count` seeds and other `names` in place of its own.

    Its own are three seeds of the full suite, two of the quick one, one of the others. Raises `UserError`.
    """
    if count is not None and count < 1:
        raise UserError(f"seeds is {count}: at least 1 run of each prompt is expected")
    first = QUICK_SEED if name == "quick" else 0
    own = {"tiny": TINY, "quick": QUICK, "full": full_suite(), "images": picture_suite()}[name]
    default = 1 if names else {"full": 3, "quick": 2}.get(name, 1)
    return Suite(names or own, tuple(range(first, first + (count or default))))


def _match(prompt: str) -> re.Match[str] | None:
    noun = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(OBJECTS)})"
    return re.fullmatch(rf"{noun}(?: ({'|'.join(RELATIONS)}) {noun})?", prompt.strip())


def has_truth(prompt: str) -> bool:
    """Whether the prompt is about the world: an object in a colour, or a pair of them."""
    return _match(prompt) is not None


def truth_of(prompt: str) -> tuple[Shape, np.ndarray]:
    """The true shape of a prompt about the world, and its face colours (F, 3).

    Raises `UserError` for any other prompt.
    """
    match = _match(prompt)
    if match is None:
        raise UserError(
            f"{prompt!r} is no prompt of the world: "
            "expected 'a red teapot' or 'a blue cube on top of a green cylinder'"
        )
    colour, name, relation, second_colour, second_name = match.groups()
    first = make_shape(name)
    if relation is None:
        return first, first.albedo(np.array(COLOURS[colour]))
    colours = np.array(COLOURS[colour]), np.array(COLOURS[second_colour])
    pair = make_pair(first, relation, make_shape(second_name), colours)
    return pair, pair.accents


@dataclass(frozen=True)
class Subject:
    """One prompt about the world, or one picture of something of it, by the name of its rows.

    The camera of a picture is a function of the name.
    """

    name: str

    @property
    def is_picture(self) -> bool:
        """Whether a picture is given, and no prompt."""
        return self.name.startswith(PICTURE)

    @property
    def caption(self) -> str:
        """The prompt that names what is shown; empty for an unnamed shape."""
        caption = self.name.removeprefix(PICTURE)
        return "" if caption.startswith(ASSEMBLY) else caption

    @property
    def group(self) -> str:
        """known or unseen, of a picture; empty for a prompt."""
        if not self.is_picture:
            return ""
        return "known" if self.caption else "unseen"

    def check(self) -> None:
        """Raise `UserError` for a name that is not about the world."""
        if not self.caption:
            _seed_of(self.name)
        elif not has_truth(self.caption):
            truth_of(self.caption)  # raises

    @property
    def truth(self) -> tuple[Shape, Albedo]:
        """The true shape, with the colours (F, 3) of its faces or a function of points and faces.

        Raises `UserError` for a name that is not about the world.
        """
        if self.caption:
            return truth_of(self.caption)
        return _assembly_truth(self.name)

    @property
    def angles(self) -> tuple[float, float]:
        """Azimuth and elevation of the picture in degrees; of a prompt 0, from where the front is seen."""
        if not self.is_picture:
            return 0.0, 0.0
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        return float(rng.uniform(-180, 180)), float(rng.uniform(*PICTURE_ELEVATION))

    def camera(self, resolution: int) -> Cameras:
        """The camera of the picture."""
        return picture_camera(*self.angles, resolution)

    def save_picture(self, path: Path) -> None:
        """Write the picture as a PNG with transparency."""
        shape, albedo = self.truth
        view = render(RayCaster(shape.mesh), albedo, self.camera(PICTURE_SIDE))
        with atomic_path(path) as temporary:
            Image.fromarray((view.rgba * 255 + 0.5).astype(np.uint8), "RGBA").save(temporary)


def _seed_of(name: str) -> int:
    """The seed of a pictured assembly, by the name of the subject."""
    seed = name.removeprefix(PICTURE + ASSEMBLY)
    if not seed.isdecimal():
        raise UserError(
            f"{name!r} is no picture of the world: "
            f"expected '{PICTURE}a red teapot' or '{PICTURE}{ASSEMBLY}{UNSEEN[0]}'"
        )
    return int(seed)


@lru_cache(maxsize=4)
def _assembly_truth(name: str) -> tuple[Shape, Albedo]:
    shape = make_assembly(_seed_of(name))

    def colours(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
        return shape.colours_at(points, faces, np.zeros(3))

    return shape, colours
