"""The words of a command line as hydra's grammar reads them."""

import re
from collections.abc import Container
from pathlib import Path

from distill.runtime.errors import UserError


def quoted(argument: str, sweep: bool = False) -> str:
    """`prompt=a red teapot, please` as hydra's grammar reads it; quoted values and lists stay.

    In a sweep each value between commas is quoted, so that `prompt=a red cube,a blue cube` are two, and the
    lines of a file are values: `prompt=@prompts.txt`.
    """
    key, equals, value = argument.partition("=")
    if sweep and equals and value.startswith("@"):
        return f"{key}=" + ",".join(map(_escaped, _lines(argument, Path(value[1:]))))
    if not equals or argument.startswith("-") or not re.search(r"\s", value) or value[:1] in "\"'[{":
        return argument
    values = [part.strip() for part in value.split(",")] if sweep else [value]
    return f"{key}=" + ",".join(map(_escaped, values))


def _escaped(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _lines(argument: str, path: Path) -> list[str]:
    """The lines of a file that are not empty, each once. Raises `UserError` where there are none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{argument}: {path} cannot be read ({error}): give a text file of values") from None
    values = list(dict.fromkeys(filter(None, lines)))
    if not values:
        raise UserError(f"{argument}: {path} has no lines: give a text file with a value on each line")
    return values


def named(arguments: list[str], positional: str | None) -> list[str]:
    """Arguments; those without a name (`"a red teapot" "a blue torus"`) become the list `positional`."""
    bare = [argument for argument in arguments if not argument.startswith("-") and "=" not in argument]
    if positional is None or not bare or {"--cfg", "-c", "--package", "-p"} & set(arguments):
        return arguments
    texts = ", ".join(map(_escaped, bare))
    return [argument for argument in arguments if argument not in bare] + [f"{positional}=[{texts}]"]


def forced(argument: str, chosen: Container[str]) -> str:
    """`key=value` as `++key=value`, as a key that no YAML holds needs; hydra's and `chosen` groups stay."""
    key, equals, _ = argument.partition("=")
    own = argument[:1] in ("-", "+", "~") or re.split("[./]", key)[0] == "hydra" or key in chosen
    return argument if own or not equals else f"++{argument}"
