"""Runs: resuming after real signals is bit-identical; directories, metrics, trackers, results."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import ROOT
from PIL import Image
from torch import nn

from distill.data.folders import batch_indices
from distill.runtime.checkpoint import checkpoint_path, load_state
from distill.runtime.ema import EMA
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid, save_png
from distill.runtime.names import slug
from distill.runtime.run import Run, RunOptions

STEPS = 30


def train(directory: str, pause: float = 0.0, steps: int = STEPS, rate: float = 1e-2, **options: Any) -> Run:
    """A toy training with every kind of state; `pause` seconds per step."""
    run_options = RunOptions(directory, steps, trackers=(), checkpoint_every=7, log_every=3, **options)
    run = Run(run_options, {"rate": rate, "run": {**asdict(run_options), "trackers": []}}, "toy")
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=STEPS + 1)
    average = EMA(model, 0.99)
    run.track(model=model, optimizer=optimizer, scheduler=scheduler, average=average)
    for step in run.steps():
        target = (
            batch_indices(10, 4, step, run_options.seed)[:, None] / 10 + random.random() + np.random.rand()
        )
        loss = (model(torch.randn(4, 4, generator=run.generator)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        average.update()
        run.log(loss=loss, rate=scheduler.get_last_lr()[0])
        time.sleep(pause)
    return run


def state_of(directory: Path, step: int = STEPS) -> dict[str, Any]:
    state = load_state(checkpoint_path(directory / "checkpoints", step))
    return {key: state[key] for key in ("step", "parts", "random", "metrics")}


def assert_equal(a: Any, b: Any) -> None:
    """Bit for bit, at every level of nesting."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for first, second in zip(a, b, strict=True):
            assert_equal(first, second)
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b)
    else:
        assert a == b


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "uninterrupted"
    train(str(directory))
    return directory


def start(directory: Path, pause: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums depend on it
    command = [sys.executable, __file__, str(directory), str(pause)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def logged(directory: Path, step: int) -> Callable[[], bool]:
    metrics = directory / "metrics.jsonl"
    return lambda: metrics.exists() and f'"step": {step},' in metrics.read_text()


def test_sigkill_resumes_bit_identically(tmp_path: Path, uninterrupted: Path) -> None:
    process = start(tmp_path, pause=0.05)
    wait_for(logged(tmp_path, 12), process)  # some steps after the checkpoint of step 7
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not checkpoint_path(tmp_path / "checkpoints", STEPS).exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')  # a truncated line
    run = train(str(tmp_path))
    assert run.step == STEPS
    assert_equal(state_of(tmp_path), state_of(uninterrupted))
    assert metrics_of(tmp_path) == metrics_of(uninterrupted)
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(3, STEPS + 1, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="draws on a CUDA device need one")
def test_draws_on_the_device_resume(tmp_path: Path) -> None:
    def draw(directory: Path, steps: int) -> list[float]:
        options = RunOptions(
            str(directory), steps, trackers=(), checkpoint_every=2, device="cuda", plan=False
        )
        run = Run(options, {}, "draws")
        assert run.data_device(2**10) == (run.device, run.device_generator)
        assert run.data_device(2**60) == (torch.device("cpu"), run.generator)
        assert run.device_generator.device.type == "cuda" and run.generator.device.type == "cpu"
        generator = run.device_generator
        return [float(torch.rand((), generator=generator, device="cuda")) for _ in run.steps()]

    whole = draw(tmp_path / "whole", 6)
    assert draw(tmp_path / "parts", 2) + draw(tmp_path / "parts", 6) == whole and len(set(whole)) == 6


def test_sigterm_checkpoints_exits_143_and_resumes(tmp_path: Path, uninterrupted: Path) -> None:
    process = start(tmp_path, pause=0.05)
    wait_for(logged(tmp_path, 9), process)
    process.terminate()
    assert process.stderr
    message = process.stderr.read()
    assert process.wait() == 143
    stopped = int(max((tmp_path / "checkpoints").iterdir()).stem[5:])
    assert 9 <= stopped < STEPS
    assert f"stopped by SIGTERM after step {stopped} of {STEPS}" in message and "resume with: " in message
    assert "Traceback" not in message
    assert train(str(tmp_path)).seconds > 9 * 0.05
    assert_equal(state_of(tmp_path), state_of(uninterrupted))
    assert metrics_of(tmp_path) == metrics_of(uninterrupted)


def read_until(process: subprocess.Popen[str], expected: str) -> str:
    """The standard error of the process, up to the expected text at least."""
    assert process.stderr
    output = ""
    while expected not in output:
        chunk = os.read(process.stderr.fileno(), 4096).decode()
        assert chunk, output
        output += chunk
    return output


def test_second_signal_kills_immediately(tmp_path: Path) -> None:
    process = start(tmp_path, pause=600.0)
    read_until(process, "toy:   0%")
    process.send_signal(signal.SIGINT)
    assert "SIGINT: stops with a checkpoint after this step" in read_until(process, "a second one kills")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT


def test_sigint_exits_130_and_restores_handlers(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    run = Run(RunOptions(str(tmp_path), 5, trackers=()), {}, "toy")
    with pytest.raises(SystemExit) as stop:
        for step in run.steps():
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
    assert stop.value.code == 130 and run.step == 3
    assert checkpoint_path(tmp_path / "checkpoints", 3).exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_finished_run_yields_no_steps_and_restores_its_state(uninterrupted: Path) -> None:
    checkpoint = checkpoint_path(uninterrupted / "checkpoints", STEPS)
    before = checkpoint.stat().st_mtime_ns, metrics_of(uninterrupted)
    run = train(str(uninterrupted))
    assert run.step == STEPS
    assert (checkpoint.stat().st_mtime_ns, metrics_of(uninterrupted)) == before
    state = {name: part.state_dict() for name, part in run._parts.items()}
    assert_equal(state, state_of(uninterrupted)["parts"])


def test_truncated_checkpoint_falls_back_to_the_previous_one(tmp_path: Path, uninterrupted: Path) -> None:
    train(str(tmp_path), steps=20)
    newest = checkpoint_path(tmp_path / "checkpoints", 20)
    newest.write_bytes(newest.read_bytes()[:1000])
    train(str(tmp_path))  # only `steps` differs, which is allowed
    assert_equal(state_of(tmp_path), state_of(uninterrupted))


def test_changed_config_is_refused_with_keys_and_fix(tmp_path: Path) -> None:
    train(str(tmp_path), steps=2)
    with pytest.raises(UserError, match=r"rate \(0.01 -> 0.02\).*overwrite=true"):
        train(str(tmp_path), steps=2, rate=2e-2)
    with pytest.raises(UserError, match=r"run.seed \(0 -> 1\)"):
        train(str(tmp_path), steps=2, seed=1)
    with pytest.raises(UserError, match="holds a run"):
        train(str(tmp_path), steps=2, resume=False)
    train(str(tmp_path), steps=3, keep=1, device="cpu")
    assert json.loads((tmp_path / "config.json").read_text())["run"]["keep"] == 1


def test_overwrite_removes_only_files_of_the_run(tmp_path: Path) -> None:
    run = train(str(tmp_path), steps=9)
    run.preview("x", torch.rand(2, 3, 4, 4))
    run.finish({})
    foreign = [tmp_path / name for name in ("notes.txt", "checkpoints/best.safetensors", "previews/me.png")]
    for path in foreign:
        path.write_text("mine")
    assert train(str(tmp_path), steps=2, rate=2e-2, overwrite=True).step == 2
    assert all(path.read_text() == "mine" for path in foreign)
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    remaining = {str(path.relative_to(tmp_path)) for path in files.difference(foreign)}
    assert remaining == {"config.json", "metrics.jsonl", "checkpoints/step_00000002.safetensors"}


def test_directory_is_locked_by_one_run(tmp_path: Path) -> None:
    first = Run(RunOptions(str(tmp_path), 2, trackers=()), {}, "toy")
    with pytest.raises(UserError, match="at work"):
        Run(RunOptions(str(tmp_path), 2, trackers=()), {}, "toy")
    assert list(first.steps()) == [0, 1]
    assert list(Run(RunOptions(str(tmp_path), 4, trackers=()), {}, "toy").steps()) == [2, 3]


def test_parts_that_differ_from_the_checkpoint_are_refused(tmp_path: Path) -> None:
    def attempt(**parts: nn.Module) -> None:
        run = Run(RunOptions(str(tmp_path), 2, trackers=()), {}, "toy")
        run.track(**parts)
        list(run.steps())

    attempt(model=nn.Linear(2, 2))
    with pytest.raises(UserError, match="holds model; tracked are net"):
        attempt(net=nn.Linear(2, 2))
    with pytest.raises(UserError, match="size mismatch"):
        attempt(model=nn.Linear(3, 2))


def test_tracking_twice_or_late_is_refused(tmp_path: Path) -> None:
    run = Run(RunOptions(str(tmp_path), 2, trackers=()), {}, "toy")
    run.track(model=nn.Linear(1, 1))
    with pytest.raises(UserError, match="'model'"):
        run.track(model=nn.Linear(1, 1))
    for _ in run.steps():
        with pytest.raises(UserError, match="'late'"):
            run.track(late=nn.Linear(1, 1))


def test_metrics_are_means_and_due_counts_finished_steps(tmp_path: Path) -> None:
    run = Run(RunOptions(str(tmp_path), 5, trackers=(), log_every=2), {}, "toy")
    due = []
    for step in run.steps():
        run.log(value=torch.tensor(float(step), requires_grad=True), odd=float("inf"))
        due.append(run.due(2))
    assert due == [False, True, False, True, True]
    expected = [{"step": 2, "value": 0.5}, {"step": 4, "value": 2.5}, {"step": 5, "value": 4.0}]
    assert metrics_of(tmp_path) == [{**line, "odd": None} for line in expected]


def test_trackers_receive_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(RunOptions(str(tmp_path), 4, log_every=2), {}, "a red/toy")
    for step in run.steps():
        run.log(value=float(step))
    (events,) = (tmp_path / "trackers").rglob("events.*")
    accumulated = EventAccumulator(str(events)).Reload()
    assert [(event.step, event.value) for event in accumulated.Scalars("value")] == [(2, 0.5), (4, 2.5)]


def test_without_trackers_accelerate_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from distill.runtime.run import *\n"
        f"list(Run(RunOptions({str(tmp_path)!r}, 1, trackers=()), {{}}, 'toy').steps())\n"
        "assert 'accelerate' not in sys.modules and 'tensorboard' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_bad_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tracker 'nonsense' is unknown"):
        Run(RunOptions(str(tmp_path / "a"), 1, trackers=("nonsense",)), {}, "toy")
    with pytest.raises(UserError, match="keep is 0"):
        RunOptions(str(tmp_path), 1, keep=0)
    with pytest.raises(UserError, match="'abacus'"):
        Run(RunOptions(str(tmp_path / "a"), 1, trackers=(), device="abacus"), {}, "toy")
    with pytest.raises(UserError, match="no plain nested dict"):
        Run(RunOptions(str(tmp_path / "a"), 1, trackers=()), {"x": torch.ones(1)}, "toy")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["file", "file/below", "n" * 300, "/proc/run"])
def test_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run.directory is .*, which cannot be written \("):
        Run(RunOptions(str(tmp_path / name), 1, trackers=()), {}, "toy")


def test_long_prompt_as_label(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    prompt = "a red teapot, " * 1000
    run = Run(RunOptions(str(tmp_path / slug(prompt)), 2, log_every=1), {}, prompt)
    for step in run.steps():
        run.log(value=float(step))
    (events,) = (run.directory / "trackers").rglob("events.*")
    assert events.stat().st_size > 0
    assert len(run.label) == 80


def test_slugs_of_long_texts_are_short_and_distinct() -> None:
    assert slug("A red teapot!") == "a-red-teapot"
    assert slug("?") == "run"
    first, second = slug("word " * 2000), slug("word " * 2001)
    assert first != second and first == slug("word " * 2000)
    assert max(len(first), len(second)) == 100


def test_result_holds_no_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory, data = tmp_path / "outputs" / "run", tmp_path / "data"
    data.mkdir()
    run = Run(RunOptions(str(directory), 1, trackers=()), {}, "toy")
    config = {
        "run": {"directory": str(directory)},
        "files": [str(data), "shapes64"],
        "prompt": "/imagine a cat",
    }
    result = json.loads(run.finish({"config": config, "score": 0.5}).read_text())
    expected = {
        "run": {"directory": "outputs/run"},
        "files": ["data", "shapes64"],
        "prompt": "/imagine a cat",
    }
    assert result["config"] == expected and result["score"] == 0.5

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = json.loads(run.finish({"mesh": str(directory / "config.json"), "data": str(data)}).read_text())
    assert result["mesh"] == "config.json" and result["data"] == "../data"


def test_result_and_preview(tmp_path: Path) -> None:
    run = Run(RunOptions(str(tmp_path), 3, trackers=()), {}, "toy")
    paths = [run.preview("view", torch.zeros(3, 3, 4, 4)) for _ in run.steps()]
    assert [path.name for path in paths] == [f"view_0000000{step}.png" for step in (1, 2, 3)]
    result = json.loads(run.finish({"score": 0.5}).read_text())
    assert result["score"] == 0.5 and result["run"]["steps"] == 3
    assert result["run"]["peak_memory_mib"] > 50 and result["run"]["versions"]["torch"] == torch.__version__


def test_image_grid_and_png(tmp_path: Path) -> None:
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 4) / 10
    grid = image_grid(images, 2, gap=1)
    assert grid.shape == (3, 5, 9)
    assert torch.all(grid[:, :2, 5:] == 0.1) and torch.all(grid[:, 3:, :4] == 0.2)
    assert torch.all(grid[:, 2] == 1) and torch.all(grid[:, 3:, 5:] == 1)
    save_png(tmp_path / "x.png", torch.tensor([2.0, 0.5, -1.0]).view(3, 1, 1).expand(3, 4, 6))
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (6, 4) and image.getpixel((0, 0)) == (255, 128, 0)


def test_batch_indices_cover_each_epoch_once_and_are_pure() -> None:
    stream = torch.cat([batch_indices(10, 4, step, seed=3) for step in range(10)])
    epochs = stream.view(4, 10)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(10).expand(4, 10))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    assert torch.equal(batch_indices(10, 4, 7, seed=3), stream[28:32])
    assert not torch.equal(batch_indices(10, 10, 0, seed=4), batch_indices(10, 10, 1, seed=3))
    assert sorted(batch_indices(3, 7, 0, seed=0).tolist())[:2] == [0, 0]
    assert len(batch_indices(3, 7, 5, seed=0)) == 7
    batch_indices(10, 4, 7, seed=3).zero_()  # the cached permutation is not exposed
    assert torch.equal(batch_indices(10, 4, 7, seed=3), stream[28:32])


if __name__ == "__main__":
    train(sys.argv[1], pause=float(sys.argv[2]))


def test_a_directory_with_other_files_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("")
    train(str(tmp_path), steps=7)
    assert "holds other files (thesis.tex); the run's lie among them" in capsys.readouterr().err
    train(str(tmp_path), steps=9)  # a resume: they have been reported
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / ".hidden").write_text("")
    train(str(tmp_path / "fresh"), steps=1)
    assert "other files" not in capsys.readouterr().err


def test_a_run_that_lacked_memory_resumes_with_checkpointing(tmp_path: Path) -> None:
    """How a run is executed may change; what its numbers depend on may not."""
    train(str(tmp_path), steps=7)
    train(str(tmp_path), steps=9, gradient_checkpointing=True, deterministic=False, compile="off")
    with pytest.raises(UserError, match=r"run.precision \(auto -> bfloat16\)"):
        train(str(tmp_path), steps=9, precision="bfloat16")
