"""Nested mappings (from hydra or JSON) to frozen option classes and back; mistakes raise one sentence."""

import dataclasses
import inspect
import math
import pydoc
import types
import typing
from abc import ABCMeta
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from distill.runtime.errors import UserError

Options = TypeVar("Options")
TARGET = "_target_"  # hydra's key for the class that a mapping builds
SCALARS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}


def build(cls: type[Options], values: Mapping[str, Any], name: str = "", default: object = None) -> Options:
    """Build `cls` (a dataclass) from a mapping; `name` is its dotted name in error messages.

    Missing keys take their values from `default` where it is a `cls`, else from the class, at every level:
    one key overrides one value. `_target_: package.module.Class` names a subclass of `cls` to build instead.
    Raises `UserError` for an unknown key, a missing value, a value of another type and a number that is not
    finite.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{name or cls.__name__} is {values!r}: expected a group of options")
    target = target_class(cls, values, name, default)
    if inspect.isabstract(target):
        raise UserError(f"{join(name, TARGET)} is missing: expected the options class, package.module.Class")
    hints = typing.get_type_hints(target)
    fields = fields_of(target)
    defaults = defaults_of(fields, default if type(default) is target else None)
    given = {str(key): value for key, value in values.items() if key != TARGET}

    for key in given:
        if key not in fields:
            raise UserError(f"{join(name, key)} is not an option: expected one of {', '.join(fields)}")
    for key in fields:
        if key not in given and key not in defaults:
            raise UserError(f"{join(name, key)} is missing: give it a value")
    converted = {
        key: _convert(hints[key], value, join(name, key), defaults.get(key)) for key, value in given.items()
    }
    return target(**{**defaults, **converted})


def as_mapping(options: Any) -> Any:
    """Options as nested JSON values for `build`; with `_target_` where the class has an abstract base."""
    if dataclasses.is_dataclass(options):
        cls = type(options)
        target = {TARGET: f"{cls.__module__}.{cls.__qualname__}"} if isinstance(cls, ABCMeta) else {}
        fields = fields_of(cls)
        defaults = defaults_of(fields, None)
        return target | {
            key: _removed_entries(value, defaults.get(key)) | as_mapping(value)
            if isinstance(value, Mapping)
            else as_mapping(value)
            for key, value in defaults_of(fields, options).items()
        }
    if isinstance(options, Mapping):
        return {key: as_mapping(value) for key, value in options.items()}
    if isinstance(options, list | tuple):
        return [as_mapping(item) for item in options]
    return options


def _removed_entries(values: Mapping[str, Any], default: object) -> dict[str, None]:
    """null for the entries of a default mapping that are not among `values`, as `build` expects it."""
    return {key: None for key in default if key not in values} if isinstance(default, Mapping) else {}


def fields_of(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a dataclass by name."""
    return {field.name: field for field in dataclasses.fields(cls)}


def defaults_of(fields: Mapping[str, dataclasses.Field[Any]], options: object) -> dict[str, Any]:
    """By name, the fields' values in `options`, else the defaults of those that have one."""
    if options is not None:
        return {key: vars(options)[key] for key in fields}
    values = {key: field.default for key, field in fields.items() if field.default is not dataclasses.MISSING}
    for key, field in fields.items():
        if field.default_factory is not dataclasses.MISSING:
            values[key] = field.default_factory()
    return values


def target_class(
    cls: type[Options], values: Mapping[str, Any], name: str = "", default: object = None
) -> type[Options]:
    """The class that `build` makes: what `_target_` names, else the default's."""
    if TARGET not in values:
        return type(default) if isinstance(default, cls) else cls
    path = str(values[TARGET])
    try:
        target = pydoc.locate(path)
    except pydoc.ErrorDuringImport as error:
        raise UserError(
            f"{join(name, TARGET)} is {path!r}, which cannot be imported: {error.value}"
        ) from None
    if not (isinstance(target, type) and dataclasses.is_dataclass(target) and issubclass(target, cls)):
        raise UserError(
            f"{join(name, TARGET)} is {path!r}: expected package.module.Class, a kind of {cls.__name__}"
        )
    return target


def join(name: str, key: str) -> str:
    """A dotted name."""
    return f"{name}.{key}" if name else key


def _convert(hint: Any, value: Any, name: str, default: object = None) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, name, default)
    if origin in (dict, Mapping):
        return _mapping(arguments[1], value, name, default)
    if origin is tuple:
        return _sequence(arguments, value, name)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, name, default)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{name} is {value!r}: expected one of {', '.join(map(str, arguments))}")
        return value
    return _scalar(hint, value, name)


def _mapping(hint: Any, values: Any, name: str, default: object) -> dict[str, Any]:
    """Named values, merged into those of the default; null removes one.

    It may be one that the default lacks, because a preset's null stands where other configs had a value.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{name} is {values!r}: expected names with values")
    result = dict(default) if isinstance(default, Mapping) else {}
    for key, value in values.items():
        if value is None:
            result.pop(key, None)
        else:
            result[str(key)] = _convert(hint, value, join(name, str(key)), result.get(key))
    return result


def _sequence(arguments: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{name} is {value!r}: expected a list")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise UserError(f"{name} has {len(value)} entries: expected {len(arguments)}")
    pairs = zip(arguments, value, strict=True)
    return tuple(_convert(hint, item, f"{name}[{i}]") for i, (hint, item) in enumerate(pairs))


def _union(arguments: tuple[Any, ...], value: Any, name: str, default: object) -> Any:
    if value is None and type(None) in arguments:
        return None
    hints = [hint for hint in arguments if hint is not type(None)]
    if isinstance(value, Mapping):
        hints = [hint for hint in hints if dataclasses.is_dataclass(hint)] or hints
    reasons = []
    for hint in hints:
        try:
            return _convert(hint, value, name, default)
        except UserError as error:
            reasons.append(error)
    raise reasons[0]


def _scalar(hint: Any, value: Any, name: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not fits or (hint is float and not math.isfinite(value)):
        raise UserError(f"{name} is {value!r}: expected {SCALARS.get(hint, str(hint))}")
    return value
