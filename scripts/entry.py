"""The one place that knows hydra: composes a config, hands plain values on, turns a user's mistake into one line."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
sys.path.insert(0, str(CONFIGS.parent))  # a clone runs without an install too

# a run's own bar is the one to watch; both libraries read these at import
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from distill.runtime.errors import UserError  # noqa: E402
from distill.runtime.names import slug  # noqa: E402


def quoted(argument: str) -> str:
    """`prompt=a red teapot, please` as hydra's grammar wants it; quoted values, lists and sweeps of plain words stay."""
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-") or not re.search(r"\s", value) or value[:1] in "\"'[{":
        return argument
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{escaped}"'


def named(arguments: list[str], positional: str | None) -> list[str]:
    """Arguments with those that have no name (`"a red teapot" "a blue torus"`) gathered as the list `positional`, where there is one."""
    bare = [a for a in arguments if not a.startswith("-") and "=" not in a]
    if positional is None or not bare or {"--cfg", "-c", "--package", "-p"} & set(arguments):
        return arguments
    texts = ", ".join('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' for text in bare)
    return [a for a in arguments if a not in bare] + [f"{positional}=[{texts}]"]


def load_group(group: str, name: str) -> dict[str, Any]:
    """One config of a group with its own defaults, by name. Raises `UserError` where there is none."""
    from hydra import compose
    from omegaconf import OmegaConf

    path = CONFIGS / group / f"{name}.yaml"
    if not path.is_file():
        raise UserError(
            f"{group} {name!r} is none of {', '.join(sorted(p.stem for p in path.parent.glob('*.yaml')))}"
        )
    return OmegaConf.to_container(compose(f"{group}/{name}")[group])  # type: ignore[return-value]


def _check(name: str, overrides: list[str]) -> None:
    """Compose once to meet mistakes before hydra's own many-line report does."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose(name, overrides, return_hydra_config=True)
            HydraConfig.instance().set_config(config)  # what ${hydra:...} in a directory's name reads
            with open_dict(config):
                del config["hydra"]
            missing = sorted(OmegaConf.missing_keys(config), key=len)
    except (HydraException, OmegaConfBaseException) as error:
        absent = re.search(r"Missing mandatory value: (\S+)", str(error))
        if absent:
            raise UserError(
                f"{absent[1]} is missing: give {absent[1]}=... (--help lists the options)"
            ) from None
        noise = (
            "full_key",
            "object_type",
            "reference_type",
            "See ",
            "To append",
            "Config search path",
            "provider=",
            "^",
        )
        lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip()]
        told = [line.rstrip(".:;") for line in dict.fromkeys(lines) if not line.startswith(noise)]
        raise UserError(f"{'; '.join(told)} (--help lists the options)") from None
    if missing:
        raise UserError(f"{missing[0]} is missing: give {missing[0]}=... (--help lists the options)")


def _leave(error: UserError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None


def entry(name: str, main: Callable[[dict[str, Any]], None], positional: str | None = None) -> None:
    """Run `main` with the config `name` of configs/, as overridden on the command line (hydra's grammar, --multirun too).

    Arguments without a name are the list `positional`, where one is given.
    """
    import hydra
    from omegaconf import DictConfig, OmegaConf

    OmegaConf.register_new_resolver("slug", slug, replace=True)
    sys.argv[1:] = [quoted(argument) for argument in named(sys.argv[1:], positional)]

    def run(config: DictConfig) -> None:
        try:
            main(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        except UserError as error:  # within hydra, which would print a traceback
            _leave(error)

    try:
        overrides = [
            argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")
        ]
        if not {"--multirun", "-m", "--help", "-h"} & set(sys.argv):
            _check(name, overrides)
        hydra.main(config_path=str(CONFIGS), config_name=name, version_base="1.3")(run)()
    except UserError as error:
        _leave(error)
