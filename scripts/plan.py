"""Work, time and peak memory of a run, predicted before it starts.

python scripts/plan.py experiment=tiny_dmd2 machine=h100
All other arguments are options of the run: python scripts/plan.py experiment=sd15_vsd text_to_3d.views=4
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entry import entry, load_experiment, load_script, preset_script

from distill.planning.calibration import this_machine
from distill.planning.check import check
from distill.planning.control import adapter_subject
from distill.planning.hardware import HERE, card
from distill.planning.one_step import one_step_subject
from distill.planning.plan import Subject, make_plan
from distill.planning.report import Report
from distill.runtime.config import fields_of
from distill.runtime.errors import UserError, memory_advice
from distill.runtime.files import write_json
from distill.runtime.machine import machine_info, pick_device
from distill.runtime.precision import DTYPES, resolve_precision
from sds3d.planning import text_to_3d_subject

PRESET = "experiment="
SUBJECTS: dict[str, Callable[[Any], Subject]] = {
    "text_to_3d": text_to_3d_subject,
    "distill_one_step": one_step_subject,
    "train_controlnet": lambda config: adapter_subject(config.teacher, config.adapter, config.run),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run, and the machine that it is planned for."""

    script: str | None = None  # text_to_3d, distill_one_step or train_controlnet; with experiment= its own
    machine: str = HERE  # here (timed for some seconds), h100, h200, a100 or 4090
    output: str | None = None  # a JSON file for the plan
    check: bool = False  # do some steps on this machine too, and compare
    options: tuple[str, ...] = ()  # of the run, experiment=NAME among them: all other arguments


def run_options(config: Config) -> tuple[str, Any]:
    """The script that is planned and its options. Raises `UserError` for an unknown one."""
    presets = [option.partition("=")[2] for option in config.options if option.startswith(PRESET)]
    if bool(presets) == (config.script is not None):
        raise UserError("give experiment=NAME (configs/experiment/) or script=NAME, one of both")
    if config.script is not None:
        if config.script not in SUBJECTS:
            raise UserError(f"script is {config.script!r}: expected one of {', '.join(SUBJECTS)}")
        return config.script, load_script(config.script, with_prompt(config.script, config.options))

    others = [option for option in config.options if not option.startswith(PRESET)]
    script = preset_script(presets[-1])
    if script not in SUBJECTS:
        raise UserError(f"experiment {presets[-1]} runs {script}.py: expected {', '.join(SUBJECTS)}")
    return script, load_experiment(presets[-1], with_prompt(script, others))


def with_prompt(script: str, options: Sequence[str]) -> list[str]:
    """Options with a prompt, which text-to-3D requires and a plan does not depend on."""
    given = script != "text_to_3d" or any(option.startswith("prompt=") for option in options)
    return list(options) if given else [*options, "prompt=a red teapot"]


def main(config: Config) -> None:
    script, options = run_options(config)
    subject = SUBJECTS[script](options)
    device = pick_device(options.run.device)
    if config.machine == HERE:
        dtype = resolve_precision(options.run.precision, device).dtype
        plan = make_plan(subject, dtype)
        machine = this_machine(device, plan.record)
    else:
        machine = card(config.machine)
        dtype = DTYPES.get(options.run.precision, machine.precision)
        plan = make_plan(subject, dtype)
    report = Report(plan, machine, memory_advice(options, machine.accelerator))
    print(report)

    values = report.as_json()
    if config.check:
        if config.machine != HERE:
            raise UserError(f"check compares with this machine: expected machine={HERE}")
        comparison = check(subject, plan, machine, device)
        print(comparison)
        values |= {"check": {"seconds": comparison.seconds, "memory_bytes": comparison.memory}}
    if config.output is not None:
        write_json(Path(config.output), {**values, **machine_info()})
        print(f"written: {config.output}")


def separated(arguments: Sequence[str]) -> list[str]:
    """Arguments of this script; those of the run become its `options`."""
    own = [word for word in arguments if word.startswith("-") or word.split("=")[0] in fields_of(Config)]
    others = [word for word in arguments if word not in own]
    return [*own, f"options={json.dumps(others, ensure_ascii=False)}"] if others else own


if __name__ == "__main__":
    sys.argv[1:] = separated(sys.argv[1:])
    entry("plan", Config, main)
