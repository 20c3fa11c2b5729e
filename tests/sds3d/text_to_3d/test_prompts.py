"""View words, their boundaries, and the prompt of a view."""

import numpy as np
import pytest

from sds3d.text_to_3d.prompts import BACK, FRONT, OVERHEAD, VIEWS, margin, view_of, view_prompt


@pytest.mark.parametrize(
    ("azimuth", "elevation", "view"),
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
def test_view_of_a_camera(azimuth: float, elevation: float, view: str, turns: int) -> None:
    assert view_of(azimuth + 360 * turns, elevation) == view


def test_every_view_occurs_and_views_are_mirror_symmetric() -> None:
    azimuths = np.arange(-180, 180, 7.5)
    assert {view_of(a, e) for a in azimuths for e in (0, 70)} == set(VIEWS)
    assert all(view_of(a, 10) == view_of(-a, 10) for a in azimuths)


@pytest.mark.parametrize("seed", range(4))
def test_margin_is_the_distance_to_another_view(seed: int) -> None:
    """Against a search over cameras at steps of a third of a degree."""
    rng = np.random.default_rng(seed)
    steps = np.arange(-61, 61, 1 / 3)
    for azimuth, elevation in zip(rng.uniform(-400, 400, 5), rng.uniform(-10, 80, 5), strict=True):
        view = view_of(azimuth, elevation)
        cameras = [(s, azimuth + s, elevation) for s in steps]
        cameras += [(s, azimuth, elevation + s) for s in steps if -90 <= elevation + s <= 90]
        nearest = min(abs(s) for s, a, e in cameras if view_of(a, e) != view)
        assert nearest - 0.34 <= margin(azimuth, elevation) <= nearest + 0.01


def test_margin_is_zero_on_a_boundary() -> None:
    assert margin(FRONT, 0) == margin(-BACK, 0) == margin(360 + FRONT, 0) == margin(0, OVERHEAD) == 0
    assert margin(45, 70) == 10  # overhead, the azimuth has no effect


def test_prompt_of_a_view() -> None:
    assert view_prompt("a red teapot", "front") == "a red teapot, front view"
