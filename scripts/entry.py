"""The one module that knows hydra: composes configs, builds options, reports errors in one line."""

import importlib
import os
import re
import sys
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn, TypeVar

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
sys.path.insert(0, str(CONFIGS.parent))  # a clone runs without an install too

# a run shows its own progress bar; both libraries read these at import
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from arguments import forced, named, quoted  # noqa: E402

from distill.runtime.config import build, defaults_of, fields_of  # noqa: E402
from distill.runtime.errors import UserError, allocation_error  # noqa: E402
from distill.runtime.experiment import (  # noqa: E402
    ExperimentInfo,
    check_mixture,
    experiment_body,
    find_experiment,
    load_experiments,
    preset_lines,
)
from distill.runtime.help import help_lines  # noqa: E402
from distill.runtime.names import slug  # noqa: E402

Options = TypeVar("Options")
HYDRA_NOISE = ("full_key", "object_type", "reference_type", "See ", "To append", "Config search path")
HELP = "--help lists the options"
# Arguments, by (the first parts of) their name or whole, that bring the config of a group with them, in
# scripts that choose from it.
DISTILLATION = "recipe=score_distillation"
IMPLIED = {"image": "input=image", "suite=images": "input=image"}
IMPLIED |= dict.fromkeys(("objective", "control", "experiment"), DISTILLATION)
for stage in ("score_distillation", "orientation", "sdedit_refinement"):
    IMPLIED[f"text_to_3d.stages.{stage}"] = DISTILLATION


def groups() -> dict[str, list[str]]:
    """The config groups, each with the names of its configs."""
    folders = sorted(path for path in CONFIGS.iterdir() if path.is_dir())
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def with_implied(arguments: list[str], chosen: Container[str]) -> list[str]:
    """Arguments with the configs that they bring with them, first; of groups that they name, their own."""
    given = [
        argument
        for argument in arguments
        if "." in argument.partition("=")[0] or not argument.endswith(("=", "=null", "=none"))
    ]
    names = {argument.partition("=")[0].lstrip("+") for argument in given}
    # objective.time.low=0.05 names the objective too
    prefixes = {prefix for name in names for prefix in accumulate(name.split("."), "{}.{}".format)}
    implied = [IMPLIED[key] for key in (*sorted(prefixes), *given) if key in IMPLIED]
    groups = {choice: choice.partition("=")[0] for choice in dict.fromkeys(implied)}
    return [*(c for c, group in groups.items() if group in chosen and group not in names), *arguments]


def _defaults(name: str) -> list[Any]:
    """The defaults list of a script's config; empty where it has none."""
    import yaml

    path = CONFIGS / f"{name}.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    defaults: list[Any] = values.get("defaults", [])
    return defaults


def lineage(name: str) -> list[str]:
    """A script and those whose configs its own builds on: bench, text_to_3d."""
    parents = [entry for entry in _defaults(name) if entry not in ("base", "_self_")]
    return [name, *(base for parent in parents if isinstance(parent, str) for base in lineage(parent))]


def with_experiments(arguments: list[str], cls: type, scripts: Sequence[str], chosen: list[str]) -> list[str]:
    """Arguments with `experiment=NAME` in hydra's form, which appends it to the defaults list.

    Raises `UserError` for a preset of none of `scripts` and for one that a chosen group contradicts. An
    option `experiment` that is no preset's description (plan.py's) is left alone.
    """
    hint = typing.get_type_hints(cls).get("experiment")
    if hint is not None and ExperimentInfo not in typing.get_args(hint):
        return arguments
    choices = dict(argument.split("=", 1) for argument in arguments if argument.split("=")[0] in chosen)
    result = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key.lstrip("+") != "experiment" or not equals:
            result.append(argument)
        elif value not in ("", "null"):
            experiments = load_experiments(CONFIGS / "experiment")
            for name in value.split(","):  # several in a sweep
                find_experiment(name, scripts, experiments)
                check_mixture(name, experiment_body(CONFIGS / "experiment", name), choices)
            result.append(f"+experiment={value}")
    return result


def composing() -> Any:
    """The context in which hydra composes the configs of `CONFIGS`."""
    from hydra import initialize_config_dir

    return initialize_config_dir(str(CONFIGS), version_base="1.3")


def chosen_groups(name: str) -> list[str]:
    """The groups that a script's config, or one that it builds on, chooses from."""
    entries = [entry for config in lineage(name) for entry in _defaults(config)]
    choices = {group for entry in entries if isinstance(entry, dict) for group in entry}
    return [group for group in groups() if group in choices]


def load_group(group: str, name: str, options: type[Options]) -> Options:
    """The options in one config of a group. Raises `UserError` where there is none of that name."""
    from hydra import compose
    from omegaconf import OmegaConf

    if name not in groups()[group]:
        raise UserError(f"{group} is {name!r}: expected one of {', '.join(groups()[group])}")
    values = OmegaConf.to_container(compose(f"{group}/{name}")[group])
    return build(options, values, f"{group} {name}")  # type: ignore[arg-type]


def compose_config(name: str, overrides: list[str]) -> Any:
    """The config that hydra will compose. Raises `UserError` where it would print a report of many lines."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    try:
        with composing():
            config = compose(name, overrides, return_hydra_config=True)
            HydraConfig.instance().set_config(config)  # for ${hydra:...} in a directory's name
            with open_dict(config):
                del config["hydra"]
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_message(error)) from None
    return config


def _message(error: Exception) -> str:
    """Hydra's report as one sentence."""
    missing = re.search(r"Missing mandatory value: (\S+)", str(error))
    if missing:
        return f"{missing[1]} is missing: give {missing[1]}=... ({HELP})"
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip()]
    noise = (*HYDRA_NOISE, "provider=", "^")
    sentences = [line.rstrip(".:;") for line in dict.fromkeys(lines) if not line.startswith(noise)]
    return f"{'; '.join(sentences)} ({HELP})"


def values_of(config: Any) -> Mapping[str, Any]:
    """The composed config as plain values. Raises `UserError` for a missing value."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        missing = sorted(OmegaConf.missing_keys(config), key=len)
        if missing:
            raise UserError(f"{missing[0]} is missing: give {missing[0]}=... ({HELP})")
        return _named_experiment(OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(_message(error)) from None


def _named_experiment(values: Any) -> Any:
    """Config values with the preset's name in its description."""
    name = _experiment("")
    return {**values, "experiment": {"name": name, **values["experiment"]}} if name else values


def _experiment(default: str) -> str:
    """`${experiment:one_step}`: the name of the chosen preset, else the default."""
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.get().runtime.choices.get("experiment") or default


def load_experiment(name: str, arguments: Sequence[str] = ()) -> Any:
    """The options that a preset gives to the script it belongs to, with command-line arguments on top.

    Their `experiment` is the preset's description. Raises `UserError`.
    """
    return load_script(preset_script(name), [f"experiment={name}", *arguments])


def preset_script(name: str) -> str:
    """The script that a preset belongs to. Raises `UserError` where there is none of that name."""
    experiments = load_experiments(CONFIGS / "experiment")
    scripts = {info.script for info in experiments.values()}
    return find_experiment(name, sorted(scripts), experiments).script


def load_script(script: str, arguments: Sequence[str] = ()) -> Any:
    """The options that a script has with command-line arguments. Raises `UserError`."""
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()  # of the script that asks for those of another one
    cls = importlib.import_module(script).Config
    register_resolvers(cls)
    chosen = chosen_groups(script)
    words = with_experiments(with_implied([*map(quoted, arguments)], chosen), cls, [script], chosen)
    return build(cls, values_of(compose_config(script, [forced(word, chosen) for word in words])))


def register_resolvers(cls: type) -> None:
    """What configs may compute: ${slug:...} and ${stem:...} (of a path), ${option:...} of an options class,
    ${experiment:...}.
    """
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("slug", slug, replace=True)
    OmegaConf.register_new_resolver("stem", lambda path: slug(Path(str(path)).stem), replace=True)
    OmegaConf.register_new_resolver("option", partial(_option, cls), replace=True)
    OmegaConf.register_new_resolver("experiment", _experiment, replace=True)


def _option(cls: type, path: str, *, _root_: Any) -> Any:
    """`${option:run.seed}`: the value in the config, else the default of the options class."""
    from omegaconf import OmegaConf

    value = OmegaConf.select(_root_, path)
    options: Any = None
    for key in [] if value is not None else path.split("."):
        fields = fields_of(cls)
        value = defaults_of(fields, options).get(key)
        cls, options = typing.get_type_hints(cls)[key], value
    return value


def _print_help(
    cls: type, name: str, overrides: list[str], chosen: list[str], scripts: Sequence[str]
) -> None:
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(compose_config(name, overrides))
    values["experiment"] = _experiment("null")  # its description is no option
    lines = [f"{sys.modules[cls.__module__].__doc__}\n"]
    lines += [
        f"usage: python {sys.argv[0]} [key=value ...]   (lists: key=[a, b]; sweeps: --multirun key=a,b)\n"
    ]
    lines += [f"{group}: {', '.join(groups()[group])}" for group in chosen]
    lines += preset_lines(load_experiments(CONFIGS / "experiment"), scripts)
    description = ("  experiment.", "\nexperiment:")
    lines += [line for line in help_lines(cls, values) if not line.startswith(description)]
    try:
        print(*lines, "\nRuns resume when the same command is given again.", sep="\n", flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has enough; nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def announce(options: object) -> None:
    """Print the chosen preset's description, in the first of several processes."""
    info = vars(options).get("experiment")
    if isinstance(info, ExperimentInfo) and os.environ.get("RANK", "0") == "0":
        print(f"experiment {info}", flush=True)


def mistake_of(error: Exception, options: object) -> UserError | None:
    """The user's mistake that an exception tells of, too little memory included; None for a defect."""
    return error if isinstance(error, UserError) else allocation_error(error, options)


def _exit(error: UserError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None


def entry(
    name: str,
    cls: type[Options],
    main: Callable[[Options], None],
    positional: str | None = None,
    parallel: bool = False,
) -> None:
    """Run `main` with the options `cls` built from configs/`name`.yaml, if there is one, and the arguments.

    Arguments follow hydra's grammar (--multirun too); those without a name are the list `positional`.
    parallel: whether several processes of torchrun can do it together.
    """
    import hydra
    from omegaconf import DictConfig

    config_name = name if (CONFIGS / f"{name}.yaml").is_file() else "base"
    register_resolvers(cls)
    chosen, scripts = chosen_groups(config_name), lineage(name)

    def run(config: DictConfig) -> None:
        options = None
        try:
            options = build(cls, values_of(config))
            announce(options)
            main(options)
        except Exception as error:  # within hydra, which would print a traceback
            mistake = mistake_of(error, options)
            if mistake is None:
                raise
            _exit(mistake)

    def start(task: Callable[[DictConfig], None]) -> None:
        hydra.main(config_path=str(CONFIGS), config_name=config_name, version_base="1.3")(task)()

    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # before options that depend on it are built
            importlib.import_module("distill.runtime.processes").join(name, parallel)
        arguments = with_implied(named(sys.argv[1:], positional), chosen)
        arguments = with_experiments(arguments, cls, scripts, chosen)
        sweep = bool({"--multirun", "-m"} & set(sys.argv))
        sys.argv[1:] = [forced(quoted(argument, sweep), chosen) for argument in arguments]
        overrides = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
        if {"--help", "-h"} & set(sys.argv):
            return _print_help(cls, config_name, overrides, chosen, scripts)
        if sweep:
            # By the script's name: what other processes are sent must not be of `__main__`.
            register_resolvers(importlib.import_module(name).Config)
            return importlib.import_module("sweep").run_sweep(name, start)
        config = compose_config(config_name, overrides)
        if len(overrides) < len(sys.argv) - 1 or any(word.startswith("hydra") for word in overrides):
            return start(run)  # hydra's own options, such as --cfg job
        with composing():  # what hydra does besides, logging and directories, is off: see base.yaml
            run(config)
    except UserError as error:
        _exit(error)
