"""View words, their boundaries, and the prompt of a view."""

import numpy as np
import pytest

from sds3d.text_to_3d.prompts import BACK, FRONT, OVERHEAD, VIEWS, margin, view_of, view_prompt


@pytest.mark.parametrize(
    ("azimuth", "elevation", "word"),
    [
        (0, 0, "front"),
        (44.9, 0, "front"),
        (-44.9, 0, "front"),
        (FRONT, 0, "side"),
        (-FRONT, 0, "side"),
        (90, 0, "side"),
        (-90, 0, "side"),
        (BACK, 0, "side"),
        (135.1, 0, "back"),
        (180, 0, "back"),
        (-180, 0, "back"),
        (-135.1, -10, "back"),
        (0, OVERHEAD, "front"),
        (0, 60.1, "overhead"),
        (180, 89, "overhead"),
        (90, -89, "side"),
    ],
)
@pytest.mark.parametrize("turns", [-2, 0, 1])
def test_the_word_of_a_view(azimuth: float, elevation: float, word: str, turns: int) -> None:
    assert view_of(azimuth + 360 * turns, elevation) == word


def test_every_word_is_told_and_left_is_right() -> None:
    azimuths = np.arange(-180, 180, 7.5)
    assert {view_of(a, e) for a in azimuths for e in (0, 70)} == set(VIEWS)
    assert all(view_of(a, 10) == view_of(-a, 10) for a in azimuths)


@pytest.mark.parametrize("seed", range(4))
def test_the_margin_is_the_way_to_another_word(seed: int) -> None:
    """Against a search of all cameras around, at a third of a degree."""
    rng = np.random.default_rng(seed)
    steps = np.arange(-61, 61, 1 / 3)
    for azimuth, elevation in zip(rng.uniform(-400, 400, 5), rng.uniform(-10, 80, 5), strict=True):
        word = view_of(azimuth, elevation)
        beside = [abs(s) for s in steps if view_of(azimuth + s, elevation) != word]
        above = [
            abs(s) for s in steps if -90 <= elevation + s <= 90 and view_of(azimuth, elevation + s) != word
        ]
        nearest = min(beside + above)
        assert nearest - 0.34 <= margin(azimuth, elevation) <= nearest + 0.01


def test_the_margin_is_zero_on_a_boundary() -> None:
    assert margin(FRONT, 0) == margin(-BACK, 0) == margin(360 + FRONT, 0) == margin(0, OVERHEAD) == 0
    assert margin(45, 70) == 10  # above, the azimuth does not matter


def test_the_prompt_of_a_view() -> None:
    assert view_prompt("a red teapot", "front") == "a red teapot, front view"
