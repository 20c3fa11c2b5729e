"""Mappings to option classes: values arrive typed, every mistake is one sentence naming the place."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from distill.objectives.options import LinearSchedule, ObjectiveOptions, Term, TimestepSampler
from distill.runtime.config import as_mapping, build
from distill.runtime.errors import UserError


@dataclass(frozen=True)
class Inner:
    size: int = 3
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UserError(f"size is {self.size}: expected at least 0")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[Inner, ...] = ()
    kind: Literal["a", "b"] = "a"
    maybe: int | None = None
    either: float | tuple[float, ...] = 0.0
    flag: bool = False


def test_defaults_and_nesting() -> None:
    assert build(Outer, {"name": "x"}) == Outer("x")
    given = {"name": "x", "inner": {"size": 5}, "pair": [1, 2], "many": [{"size": 1}, {}]}
    got = build(Outer, {**given, "kind": "b", "maybe": 4, "either": [1, 2], "flag": True})
    assert got == Outer("x", Inner(5), (1.0, 2.0), (Inner(1), Inner()), "b", 4, (1.0, 2.0), True)
    assert isinstance(got.pair[0], float) and isinstance(got.either, tuple)
    assert build(Outer, {"name": "x", "maybe": None, "either": 2}) == Outer("x", either=2.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "x", "nmae": 1}, "^run.nmae is not an option: expected one of name, inner"),
        ({}, "^run.name is missing"),
        ({"name": 3}, "^run.name is 3: expected text"),
        ({"name": "x", "inner": {"size": "3"}}, "^run.inner.size is '3': expected a whole number"),
        ({"name": "x", "inner": {"size": True}}, "^run.inner.size is True: expected a whole number"),
        ({"name": "x", "inner": {"size": 1.5}}, "^run.inner.size is 1.5: expected a whole number"),
        ({"name": "x", "inner": {"ratio": True}}, "^run.inner.ratio is True: expected a finite number"),
        ({"name": "x", "inner": {"ratio": None}}, "^run.inner.ratio is None: expected a finite number"),
        ({"name": "x", "inner": {"ratio": math.inf}}, "^run.inner.ratio is inf: expected a finite number"),
        ({"name": "x", "inner": {"ratio": math.nan}}, "^run.inner.ratio is nan: expected a finite number"),
        ({"name": "x", "inner": 3}, "^run.inner is 3: expected a group"),
        ({"name": "x", "inner": {"size": -1}}, "^size is -1"),
        ({"name": "x", "pair": [1]}, "^run.pair has 1 entries: expected 2"),
        ({"name": "x", "pair": "ab"}, "^run.pair is 'ab': expected a list"),
        ({"name": "x", "many": [{}, {"site": 1}]}, r"^run.many\[1\].site is not an option"),
        ({"name": "x", "kind": "c"}, "^run.kind is 'c': expected one of a, b"),
        ({"name": "x", "maybe": "no"}, "^run.maybe is 'no': expected a whole number"),
        ({"name": "x", "flag": 1}, "^run.flag is 1: expected true or false"),
    ],
)
def test_mistakes(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(Outer, values, "run")


def test_an_objective_as_its_yaml_reads() -> None:
    terms = [
        {"predict": "teacher", "guidance": 7.5},
        {"predict": "teacher", "prompt": "bad", "coefficient": {"start": 0, "end": -1}},
    ]
    given = {
        "terms": terms,
        "time": {"high": [0.98, 0.5], "anneal": "sqrt"},
        "prompts": {"bad": "{prompt}, bad"},
    }
    expected = (Term("teacher", guidance=7.5), Term("teacher", LinearSchedule(0.0, -1.0), "bad"))
    law = TimestepSampler(high=(0.98, 0.5), anneal="sqrt")
    assert build(ObjectiveOptions, given) == ObjectiveOptions(
        expected, time=law, prompts={"bad": "{prompt}, bad"}
    )
    with pytest.raises(UserError, match="^prompts is 3: expected names with values"):
        build(ObjectiveOptions, {**given, "prompts": 3})


class Shape(ABC):
    @abstractmethod
    def area(self) -> float:
        """Of the shape."""


@dataclass(frozen=True)
class ShapeOptions(Shape):
    scale: float = 1.0


@dataclass(frozen=True)
class Square(ShapeOptions):
    side: float = 1.0

    def area(self) -> float:
        return self.side**2


@dataclass(frozen=True)
class Circle(ShapeOptions):
    radius: float = 1.0

    def area(self) -> float:
        return 3.0 * self.radius**2


@dataclass(frozen=True)
class Drawing:
    shape: ShapeOptions
    parts: Mapping[str, ShapeOptions] = field(default_factory=lambda: {"a": Square(2.0), "b": Circle(3.0)})
    inner: Inner = Inner(size=7)


SQUARE, CIRCLE = f"{__name__}.Square", f"{__name__}.Circle"


def test_target_names_the_class() -> None:
    drawing = build(Drawing, {"shape": {"_target_": CIRCLE, "radius": 2}})
    assert drawing.shape == Circle(radius=2.0)


def test_one_key_overrides_one_value_of_the_default() -> None:
    """A nested group starts from the field's default, not from its class."""
    given = {"shape": {"_target_": SQUARE}, "inner": {"ratio": 0.1}, "parts": {"a": {"side": 5}, "b": None}}
    assert build(Drawing, given) == Drawing(Square(), {"a": Square(2.0, 5.0)}, Inner(7, 0.1))
    changed = build(Drawing, {**given, "parts": {"a": {"_target_": CIRCLE}, "c": {"_target_": SQUARE}}})
    assert changed.parts == {"a": Circle(), "b": Circle(3.0), "c": Square()}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({}, "^shape._target_ is missing"),
        ({"_target_": "nowhere.Shape"}, "^shape._target_ is 'nowhere.Shape': expected package.module.Class"),
        ({"_target_": "pathlib.Path"}, "a kind of ShapeOptions"),
        ({"_target_": CIRCLE, "side": 1}, "^shape.side is not an option: expected one of scale, radius"),
    ],
)
def test_target_mistakes(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(Drawing, {"shape": shape})


def test_as_mapping_is_json_and_builds_the_same_options() -> None:
    for options in (Drawing(Circle(radius=2.0)), Outer("x", many=(Inner(1),), either=(1.0, 2.0))):
        assert build(type(options), json.loads(json.dumps(as_mapping(options)))) == options


@dataclass(frozen=True)
class Named:
    entries: dict[str, Inner] = field(default_factory=lambda: {"first": Inner(), "second": Inner()})


def test_as_mapping_states_which_default_entries_are_removed() -> None:
    options = build(Named, {"entries": {"first": None, "third": {"size": 4}}})
    assert list(options.entries) == ["second", "third"]
    assert as_mapping(options)["entries"]["first"] is None
    assert build(Named, as_mapping(options)).entries == options.entries
