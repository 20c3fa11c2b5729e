"""Help texts of option classes: each option's dotted name, default, type and comment, from the source."""

import ast
import dataclasses
import functools
import inspect
import io
import json
import textwrap
import tokenize
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from distill.runtime.config import as_mapping, defaults_of, fields_of, join, target_class

REQUIRED = "???"  # hydra's mark for a value that must be given


Group = tuple[str, type, Mapping[str, Any], Any]  # a dotted name, the class, its values and its default


def help_lines(cls: type, values: Mapping[str, Any]) -> Iterator[str]:
    """A line per option of `cls`, group by group, each after the first sentence of its docstring.

    Defaults are those of `values` (a config file's), else of the classes. Within lists and unions a class is
    listed once.
    """
    listed: dict[type, str] = {}
    groups: list[Group] = [("", cls, values, None)]
    while groups:
        name, cls, values, default = groups.pop(0)
        target: type = target_class(cls, values, name, default)
        about = " ".join((inspect.getdoc(target) or "").split("\n\n")[0].split()).split(". ")[0].rstrip(".")
        if target in listed and not values and default is None:
            yield f"\n{name}: as {listed[target]}"
            continue
        if name:
            yield f"\n{name}: {about}"
        listed.setdefault(target, name)
        fields = fields_of(target)
        defaults = defaults_of(fields, default if type(default) is target else None)
        hints = typing.get_type_hints(target)
        for key in fields:
            if not dataclasses.is_dataclass(hints[key]) and not _of_groups(hints[key]):
                value = _text(values.get(key, defaults.get(key, REQUIRED)))
                notes = "; ".join(filter(None, [_type(hints[key]), comments(target).get(key)]))
                yield f"  {join(name, key):52} = {value:22} {notes}"
        inner = [_groups(join(name, key), hints[key], values.get(key), defaults.get(key)) for key in fields]
        groups[:0] = [group for part in inner for group in part]


def _groups(name: str, hint: Any, value: Any, default: Any) -> Iterator[Group]:
    """The option classes within the type of an option."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    values = value if isinstance(value, Mapping) else {}
    if dataclasses.is_dataclass(hint):
        fits = isinstance(default, typing.cast(type, hint))
        yield name, typing.cast(type, hint), values, default if fits else None
    elif origin in (dict, Mapping):
        entries = default if isinstance(default, Mapping) else {}
        for key in [*entries, *(key for key in values if key not in entries)]:
            if values.get(key, entries.get(key)) is not None:  # null removes it
                yield from _groups(join(name, key), arguments[1], values.get(key), entries.get(key))
    elif origin is not None:
        for argument in arguments:
            yield from _groups(name + ("[]" if origin is tuple else ""), argument, value, default)


def _of_groups(hint: Any) -> bool:
    """Whether an option is a mapping of option classes, whose entries are listed one by one."""
    mapping = typing.get_origin(hint) in (dict, Mapping)
    return mapping and dataclasses.is_dataclass(typing.get_args(hint)[1])


def _text(value: Any) -> str:
    plain = as_mapping(value)
    return plain if isinstance(plain, str) and plain.strip() else json.dumps(plain)


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    names = ["null" if a is type(None) else "..." if a is Ellipsis else _type(a) for a in arguments]
    if origin is tuple:
        return f"[{', '.join(names)}]"
    return f"{{{': '.join(names)}}}" if origin in (dict, Mapping) else " | ".join(names)


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """The comments of a dataclass's fields, behind or directly above them, by field name."""
    result: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            result |= _own_comments(owner)
    return result


def _own_comments(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    by_line = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    lines = source.splitlines()
    (tree,) = ast.parse(source).body
    result = {}
    for node in typing.cast(ast.ClassDef, tree).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while lines[first - 2].strip().startswith("#"):
                first -= 1
            last = (node.end_lineno or node.lineno) + 1
            result[node.target.id] = " ".join(by_line[line] for line in range(first, last) if line in by_line)
    return result
