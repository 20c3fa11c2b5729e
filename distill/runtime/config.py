"""Plain nested mappings (as hydra or JSON give them) to typed, frozen option classes, every mistake one clear sentence."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from distill.runtime.errors import UserError

Options = TypeVar("Options")


def build(cls: type[Options], values: Mapping[str, Any], where: str = "") -> Options:
    """`cls` (a dataclass) from a mapping; missing keys take their defaults, nested option classes are built too.

    Raises `UserError` for an unknown key (naming those there are), a missing one without a default and a value of another type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where or cls.__name__} is {values!r}: expected a group of options")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"{_join(where, str(key))} is no option: expected one of {', '.join(fields)}")
    for name, field in fields.items():
        absent = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if absent and name not in values:
            raise UserError(f"{_join(where, name)} is missing: give it a value")
    return cls(**{key: _convert(hints[key], value, _join(where, key)) for key, value in values.items()})


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} is {value!r}: expected names with values")
        return {str(key): _convert(arguments[1], item, _join(where, str(key))) for key, item in value.items()}
    if origin is tuple:
        return _sequence(arguments, value, where)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{where} is {value!r}: expected one of {', '.join(map(str, arguments))}")
        return value
    return _scalar(hint, value, where)


def _sequence(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{where} is {value!r}: expected a list")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise UserError(f"{where} has {len(value)} entries: expected {len(arguments)}")
    return tuple(
        _convert(hint, item, f"{where}[{i}]")
        for i, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )


def _union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    hints = [
        a
        for a in arguments
        if a is not type(None) and (dataclasses.is_dataclass(a) or not isinstance(value, Mapping))
    ]
    reasons = []
    for hint in hints or arguments[:1]:
        try:
            return _convert(hint, value, where)
        except UserError as error:
            reasons.append(str(error))
    raise UserError(reasons[0])


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        expected = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(
            hint, str(hint)
        )
        raise UserError(f"{where} is {value!r}: expected {expected}")
    return value
