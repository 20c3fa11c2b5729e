"""`Run`, around every training: directory, seed, checkpoints, resume, signals, metrics, previews."""

import json
import math
import shlex
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from distill.runtime import processes
from distill.runtime.checkpoint import (
    Stateful,
    checkpoint_path,
    load_newest,
    prune,
    random_state,
    save_state,
    seed_everything,
    set_random_state,
)
from distill.runtime.errors import UserError
from distill.runtime.files import write_json
from distill.runtime.images import image_grid, save_png
from distill.runtime.machine import machine_info, peak_memory, use_deterministic_algorithms
from distill.runtime.precision import PrecisionName, pick_precision
from distill.runtime.run_directory import acquire, portable, truncate_metrics
from distill.runtime.sharding import gathered
from distill.runtime.signals import SignalFlag, deferred_signals
from distill.runtime.tracking import Trackers

MAX_LABEL = 80  # characters of a label, which may be a prompt, in progress bars, messages and trackers


@dataclass(frozen=True)
class RunOptions:
    """Where and how long a run goes on; only `seed`, `steps` and `precision` change its results."""

    directory: str
    steps: int = 1  # of the optimisation
    seed: int = 0
    resume: bool = True  # continue from the newest checkpoint in the directory
    overwrite: bool = False  # start over and remove the files of an earlier run in the directory
    checkpoint_every: int = 500
    keep: int = 2  # how many of the newest checkpoints stay on the disk
    preview_every: int = 500
    log_every: int = 20
    trackers: tuple[str, ...] = ("tensorboard",)  # any that accelerate supports; empty for none
    device: str = "auto"  # auto: cuda when there is one
    precision: PrecisionName = "auto"  # auto: bfloat16 on CUDA (float16 where it lacks it), float32 on a CPU
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of the networks; auto: on CUDA
    gradient_checkpointing: bool = False  # less memory, a third more time for what is trained
    deterministic: bool = False  # on CUDA deterministic kernels where torch has them, slower
    plan: bool = True  # predict work and memory before the start, and stop where too little memory is free

    def __post_init__(self) -> None:
        periods = {"checkpoint_every": self.checkpoint_every, "preview_every": self.preview_every}
        periods |= {"log_every": self.log_every, "steps": self.steps, "keep": self.keep}
        for name, value in periods.items():
            if value < 1:
                raise UserError(f"{name} is {value}; expected a whole number of at least 1")


class Run:
    """A training that can be killed at any time and resumed: on a CPU, to bit-identical results.

    On CUDA, kernels that add in no fixed order (atomics in scattered sums, cuDNN's backward passes) make any
    two runs differ in the last bits; `deterministic` replaces those that have a replacement.

    Order of use: create the run (which seeds), build modules and optimizers, `track` them, then
    `for step in run.steps()`, then `finish`. A resume loads states into the tracked objects, in the order of
    tracking.
    """

    def __init__(self, options: RunOptions, config: Mapping[str, Any], label: str) -> None:
        """Lock the directory, write `config` (plain JSON values) to config.json and seed all generators.

        Raises `UserError` when the directory cannot be written, holds a run that may not be continued or is
        in use.
        """
        self.options = options
        self.label = label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 3]}..."
        self.directory = Path(options.directory)
        self.precision = pick_precision(options.device, options.precision)
        self.device = self.precision.device
        if options.deterministic:
            use_deterministic_algorithms()
        self.scaler = self.precision.scaler()
        cuda = self.device.type == "cuda"
        self.compiled = options.compile == "on" or (options.compile == "auto" and cuda)
        self.step = 0
        self.generator = torch.Generator().manual_seed(options.seed)
        # Draws on the device itself, so that the host neither computes nor copies them.
        self.device_generator = self.generator if not cuda else torch.Generator(self.device)
        self.device_generator.manual_seed(options.seed)
        self._parts: dict[str, Stateful] = {}
        self._metrics: dict[str, list[Any]] = {}  # name -> [sum, count] since the last logged step
        self._in_step = False
        self._looping = False
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._peak_before: dict[str, float] = {}
        self._rollbacks: list[dict[str, Any]] = []
        self.main = processes.rank() == 0  # of several processes one writes, all read
        self._trackers = Trackers(options.trackers if self.main else (), self.directory / "trackers")
        self._release: Callable[[], None] = lambda: None
        if self.main:
            self._release = acquire(self.directory, config, options.resume, options.overwrite)
        processes.barrier()
        weakref.finalize(self, self._release)
        seed_everything(options.seed)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all sessions, without the steps that a kill has lost."""
        return self._seconds_before + time.monotonic() - self._started

    def data_device(self, size: int) -> tuple[torch.device, torch.Generator]:
        """Where `size` bytes of training data lie and its batches are drawn, and by which generator.

        The run's device, where they take at most half of its free memory; else the CPU.
        """
        if self.device.type == "cuda" and size > torch.cuda.mem_get_info(self.device)[0] / 2:
            return torch.device("cpu"), self.generator
        return self.device, self.device_generator

    @property
    def rollbacks(self) -> int:
        """How often the run was rolled back, in all sessions."""
        return len(self._rollbacks)

    @property
    def _finished(self) -> int:
        """Finished steps and the one in progress: a checkpoint or preview within it belongs to its end."""
        return self.step + int(self._in_step)

    def track(self, **parts: Stateful) -> None:
        """Add parts to the checkpoints. Raises `UserError` for a name used twice or after the first step."""
        for name, part in parts.items():
            if name in self._parts or self._looping:
                raise UserError(f"cannot track '{name}'; expected a new name, before the first step")
            self._parts[name] = part

    def steps(self, keep_start: bool = False) -> Iterator[int]:
        """The indices of the remaining steps; loads the newest checkpoint first and saves in intervals.

        `keep_start` saves a checkpoint before the first step too. SIGTERM and SIGINT end the process after
        the current step and a checkpoint: SystemExit(143 or 130).
        """
        self._restore()
        if keep_start and self.step == 0:
            self.save()
        try:
            if self.step < self.options.steps:
                self._trackers.start(self.label, self.step)
                with deferred_signals(self.label) as flag, self._progress() as bar:
                    yield from self._loop(bar, flag)
        finally:
            self._in_step = False
            self._trackers.close()
            self._release()

    def _loop(self, bar: tqdm, flag: SignalFlag) -> Iterator[int]:
        while self.step < self.options.steps:
            self._in_step = True
            yield self.step
            self._in_step = False
            self.step += 1
            if self.due(self.options.log_every):
                self._flush(bar)
            bar.update(self.step - bar.n)  # negative after a rollback
            number = processes.all_reduce_max(flag.number)  # a signal to one of several processes ends all
            if number or self.due(self.options.checkpoint_every):
                self.save()
            if number:
                bar.close()
                self._stop(number)

    def log(self, **metrics: float | Tensor) -> None:
        """Add scalars of a step; every `log_every` steps their means go to bar, trackers and metrics.jsonl.

        Tensors are summed on their device, without a synchronisation of the GPU.
        """
        for name, value in metrics.items():
            total = self._metrics.setdefault(name, [0.0, 0])
            total[0] = total[0] + (value.detach().float().reshape(()) if isinstance(value, Tensor) else value)
            total[1] += 1

    def due(self, every: int) -> bool:
        """Whether an action of every `every` steps, and of the last one, is due at the end of this step."""
        return self._finished % every == 0 or self._finished >= self.options.steps

    def preview(self, name: str, images: Tensor) -> Path:
        """Write images (B, 3, H, W) in [0, 1] as one grid, previews/<name>_<step>.png; returns its path."""
        path = self.directory / "previews" / f"{name}_{self._finished:08d}.png"
        if self.main:
            save_png(path, image_grid(images, math.ceil(math.sqrt(len(images)))))
        return path

    def save(self) -> Path:
        """Write a checkpoint and return its path; within a step, call it after the step's updates."""
        folder = self.directory / "checkpoints"
        path = checkpoint_path(folder, self._finished)
        state = gathered(self._state(), keep=self.main)  # by all: sharded tensors are in pieces
        if self.main:
            save_state(path, state)
            prune(folder, self.options.keep)
        processes.barrier()
        return path

    def roll_back(self, reason: str) -> None:
        """Within a step, discard it and return to the newest checkpoint, from which the loop continues.

        Increments `rollbacks`, by which the caller can vary its random draws; result.json lists them.
        Raises `UserError` where there is no checkpoint.
        """
        newest = load_newest(self.directory / "checkpoints")
        if newest is None:
            raise UserError(
                f"{reason} at step {self.step}, no checkpoint to return to: call steps(keep_start=True)"
            )
        self._rollbacks.append({"step": self._finished, "to": newest.state["step"], "reason": reason})
        seconds, rollbacks = self.seconds, self._rollbacks
        self._load(newest.state)
        self._seconds_before, self._started, self._rollbacks = seconds, time.monotonic(), rollbacks
        self._truncate()
        print(f"{self.label}: {reason}: back to step {self.step}", file=sys.stderr)
        self.step -= 1  # the loop adds the step in progress when it ends
        self.save()

    def finish(self, result: Mapping[str, Any]) -> Path:
        """Write result.json: `result` and, under `run`, steps, seconds, memory, machine and versions.

        Absolute paths in `result` become relative to the working directory, else to the run's directory.
        """
        info: dict[str, Any] = {"steps": self.step, "seconds": round(self.seconds, 3)}
        info["seed"] = self.options.seed
        info |= {"rollbacks": self._rollbacks} if self._rollbacks else {}
        info |= {**self._peak(), "device": str(self.device), **machine_info()}
        path = self.directory / "result.json"
        if self.main:
            write_json(path, {**portable(result, self.directory), "run": info})
        return path

    def _restore(self) -> None:
        """Load the newest checkpoint and truncate the metrics after it."""
        if self._looping:
            raise UserError("steps() was called twice; expected one loop per run")
        self._looping = True
        newest = load_newest(self.directory / "checkpoints")
        if newest:
            try:
                self._load(newest.state)
            except (KeyError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"{newest.path} does not fit this training ({error}); "
                    "use another directory or overwrite=true"
                ) from error
            print(f"{self.label}: resumed at step {self.step} of {self.options.steps}", file=sys.stderr)
        self._truncate()

    def _truncate(self) -> None:
        if self.main:
            truncate_metrics(self.directory, self.step)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self._finished,
            "seconds": self.seconds,
            "seed": self.options.seed,
            "peak": self._peak(),
            "rollbacks": self._rollbacks,
            "metrics": self._metrics,
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "random": {
                **random_state(),
                "run": self.generator.get_state(),
                "run_device": self.device_generator.get_state(),
            },
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        saved = state["parts"]
        if saved.keys() != self._parts.keys():
            raise ValueError(f"it holds {', '.join(saved)}; tracked are {', '.join(self._parts)}")
        if state["seed"] != self.options.seed:
            raise ValueError(f"its seed is {state['seed']}; given is {self.options.seed}")
        for name, part in self._parts.items():
            part.load_state_dict(saved[name])
        scaler = state.get("scaler")  # None in another precision, or in a checkpoint without it
        if self.scaler is not None and scaler is not None:
            self.scaler.load_state_dict(scaler)
        self.step = state["step"]
        self._seconds_before, self._peak_before = state["seconds"], state["peak"]
        self._rollbacks = state["rollbacks"]
        self._metrics = state["metrics"]
        self.generator.set_state(state["random"]["run"])
        if self.device_generator is not self.generator and "run_device" in state["random"]:
            self.device_generator.set_state(state["random"]["run_device"].cpu())
        set_random_state(state["random"])

    def _peak(self) -> dict[str, float]:
        """Peak memory in MiB over all sessions."""
        return {name: max(value, self._peak_before.get(name, 0.0)) for name, value in peak_memory().items()}

    def _progress(self) -> tqdm:
        interval = 0.2 if sys.stderr.isatty() else 20.0  # fewer lines in a log file
        return tqdm(
            total=self.options.steps,
            initial=self.step,
            desc=self.label,
            mininterval=interval,
            dynamic_ncols=True,
            disable=not self.main,
        )

    def _flush(self, bar: tqdm) -> None:
        means = {name: float(total) / count for name, (total, count) in self._metrics.items()}
        self._metrics = {}
        if not means or not self.main:
            return
        bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()}, refresh=False)
        self._trackers.log(means, self.step)
        finite = {name: value if math.isfinite(value) else None for name, value in means.items()}
        with (self.directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 3), **finite}) + "\n")

    def _stop(self, number: int) -> None:
        name = signal.Signals(number).name
        command = shlex.join(word for word in sys.orig_argv if not word.lower().endswith("overwrite=true"))
        progress = f"stopped by {name} after step {self.step} of {self.options.steps}, checkpoint written"
        print(f"{self.label}: {progress}; resume with: {command}", file=sys.stderr)
        raise SystemExit(128 + number)
