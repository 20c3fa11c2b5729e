"""Colours and solid textures of assemblies."""

from dataclasses import dataclass

import numpy as np

from sds3d.world.parts import Part
from sds3d.world.shapes import BROWN, COLOURS, DARK, GLASS, WHITE
from sds3d.world.textures import Dots, Stripes

NEUTRALS = (DARK, WHITE, BROWN, GLASS, (0.55, 0.55, 0.57), (0.80, 0.70, 0.52))
NEUTRAL_FRACTION = 0.3
VARIATION = 0.06  # half-width of the uniform change of each channel
CONTRAST = 0.3  # largest difference of a channel between the colours of one object
TEXTURED = 0.35  # fraction of features with a texture, of which the smallest have no room for one
STRIPE_WIDTH = (0.15, 0.22)  # world units: a pixel of 64 is 0.03 wide at the object
DOT_SPACING = (0.26, 0.36)
DOT_RADIUS = 0.33  # of the spacing


@dataclass(frozen=True)
class Finish:
    """The colour of a feature and, with `size` > 0, its texture."""

    colour: np.ndarray  # (3,)
    second: np.ndarray  # (3,) of the texture
    dots: bool
    axis: int  # preferred axis of the primitive across stripes
    size: float  # width of stripes or spacing of dots, world units; 0 for a plain colour


def _colour(rng: np.random.Generator) -> np.ndarray:
    choices = NEUTRALS if rng.random() < NEUTRAL_FRACTION else tuple(COLOURS.values())
    base = np.array(choices[rng.integers(len(choices))])
    return np.clip(base + rng.uniform(-VARIATION, VARIATION, 3), 0.02, 0.98)


def palette(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Distinct colours (3,)."""
    colours: list[np.ndarray] = []
    while len(colours) < count:
        colour = _colour(rng)
        if all(np.abs(colour - other).max() > CONTRAST for other in colours):
            colours.append(colour)
    return colours


def sample_finishes(rng: np.random.Generator, features: int) -> list[Finish]:
    """Finishes of the features of one assembly, of 1 to 4 colours."""
    colours = palette(rng, int(rng.choice([2, 3, 4], p=[0.45, 0.35, 0.2])))
    main = len(colours) if rng.random() < 0.88 else 1  # the colours of features without texture
    finishes = []
    for feature in range(features):
        index = feature % main if rng.random() < 0.6 else int(rng.integers(main))
        second = (index + int(rng.integers(1, len(colours)))) % len(colours)
        dots, axis = bool(rng.random() < 0.4), int(rng.integers(3))
        size = rng.uniform(*(DOT_SPACING if dots else STRIPE_WIDTH)) if rng.random() < TEXTURED else 0.0
        finishes.append(Finish(colours[index], colours[second], dots, axis, size))
    return finishes


def texture_of(finish: Finish, part: Part, origin: np.ndarray, scale: float) -> Stripes | Dots | None:
    """The texture of a part whose centre is at `origin` (3,) of the scaled mesh; None for a plain colour.

    A part that is too small for two colours is plain.
    """
    lengths = np.linalg.norm(part.linear, axis=0)
    axes = (part.linear / lengths).T
    lengths = lengths * scale
    if finish.size == 0:
        return None
    if finish.dots:
        if np.sort(lengths)[1] < finish.size:
            return None
        # Layers of balls on the faces of a box.
        spacing = lengths / np.maximum(np.round(lengths / finish.size), 1)
        return Dots(origin, axes, spacing, DOT_RADIUS * finish.size)
    order = (finish.axis + np.arange(3)) % 3
    wide = [axis for axis in order if lengths[axis] >= 2 * finish.size]
    return Stripes(origin, axes[wide[0]], finish.size) if wide else None
