"""Cached rows: computed once for a query, again for another, and by many processes together."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from command_line import ROOT

from distill.evaluation import rows as rows_module
from distill.evaluation.rows import RowJob, cached_row, shared_rows
from distill.runtime.errors import UserError
from distill.runtime.locks import claimed


def test_a_row_is_computed_once_for_a_query(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"score": float(len(calls))}

    path = tmp_path / "rows" / "row.json"
    query = {"weights": "ab", "options": {"seed": 0, "scales": (1, 2.5)}, "limit": None}
    first = cached_row(path, query, compute)
    assert first == {"weights": "ab", "options": {"seed": 0, "scales": [1, 2.5]}, "limit": None, "score": 1.0}
    assert cached_row(path, query, compute) == first == json.loads(path.read_text())
    for other in ({**query, "weights": "cd"}, {**query, "limit": 3}, {**query, "new": None}):
        assert cached_row(path, other, compute)["score"] == len(calls)
    assert len(calls) == 4


def test_an_interrupted_computation_leaves_no_row(tmp_path: Path) -> None:
    def compute() -> dict[str, float]:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        cached_row(tmp_path / "row.json", {}, compute)
    assert not (tmp_path / "row.json").exists()
    assert cached_row(tmp_path / "row.json", {}, lambda: {"score": 1}) == {"score": 1}


# Many processes

WORKER = """
import os, sys, time
from functools import partial
from pathlib import Path
from distill.evaluation import rows
from distill.evaluation.rows import RowJob, shared_rows

folder, count, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
rows.POLL = 0.05

def payload(index):
    with (folder / "started").open("a") as file:  # one write: lines of several processes do not mix
        file.write(f"{index} {os.getpid()}\\n")
    time.sleep(seconds)
    return {"square": index**2, "pid": os.getpid()}

jobs = [RowJob(folder / str(i) / "row.json", {"job": i}, partial(payload, i)) for i in range(count)]
found = shared_rows(jobs, "jobs")
assert [row["square"] for row in found] == [i**2 for i in range(count)]
"""


def worker(folder: Path, count: int, seconds: float) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", WORKER, str(folder), str(count), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


def test_two_hundred_jobs_of_workers_that_are_killed(tmp_path: Path) -> None:
    """A fifth of the jobs is lost with its worker; a new worker takes its place, as a scheduler requeues it.

    None is lost, and none is computed twice: a job is started again only where its worker was killed in it.
    """
    count, kills, rng = 200, 0, random.Random(0)
    workers = [worker(tmp_path, count, 0.05) for _ in range(4)]
    deadline = time.monotonic() + 150
    while any(job.poll() is None for job in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        if kills < count // 5 and (tmp_path / "started").is_file():
            index = rng.randrange(len(workers))
            if workers[index].poll() is None and _at_work(tmp_path, workers[index].pid):
                workers[index].send_signal(signal.SIGKILL)
                workers[index].wait()
                kills += 1
                workers[index] = worker(tmp_path, count, 0.05)
    assert all(job.returncode == 0 for job in workers)

    computed = [json.loads((tmp_path / str(i) / "row.json").read_text()) for i in range(count)]
    assert [row["square"] for row in computed] == [i**2 for i in range(count)]
    starts = [int(line.split()[0]) for line in (tmp_path / "started").read_text().splitlines()]
    assert set(starts) == set(range(count)) and kills >= 20
    assert count <= len(starts) <= count + kills
    assert len({row["pid"] for row in computed}) > 4


def _at_work(folder: Path, pid: int) -> bool:
    return any(int(line.split()[1]) == pid for line in (folder / "started").read_text().splitlines()[-4:])


def test_a_job_of_another_process_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a live process is respected; its row is then read, not computed."""
    computed: list[str] = []
    paths = [tmp_path / name / "row.json" for name in ("other", "mine")]
    jobs = [RowJob(path, {}, lambda: computed.append("x") or {"score": 1}) for path in paths]
    waits: list[float] = []

    with claimed(paths[0].with_suffix(".lock")) as mine:
        assert mine

        def finish(seconds: float) -> None:
            waits.append(seconds)
            paths[0].write_text(json.dumps({"score": 2}))

        monkeypatch.setattr(rows_module.time, "sleep", finish)
        assert [row["score"] for row in shared_rows(jobs, "jobs")] == [2, 1]
    assert computed == ["x"] and waits == [rows_module.POLL]


def test_a_mistake_ends_its_own_job_alone(tmp_path: Path) -> None:
    attempts: list[int] = []

    def compute(index: int) -> dict[str, int]:
        attempts.append(index)
        if index == 1 and len(attempts) < 4:
            raise UserError("the prompt is odd")
        return {"score": index}

    jobs = [RowJob(tmp_path / str(i) / "row.json", {}, partial(compute, i)) for i in range(3)]
    with pytest.raises(UserError, match=r"1 of 3 runs failed, the first in .*1 \(the prompt is odd\)"):
        shared_rows(jobs, "jobs")
    assert attempts == [0, 1, 2]
    failure = json.loads(jobs[1].failure.read_text())
    jobs[1].failure.write_text(json.dumps({**failure, "time": time.time() + 60}))
    with pytest.raises(UserError, match="the prompt is odd"):  # another process has just failed
        shared_rows(jobs, "jobs")
    assert attempts == [0, 1, 2]
    jobs[1].failure.write_text(json.dumps({**failure, "time": 0.0, "process": os.getpid()}))
    assert [row["score"] for row in shared_rows(jobs, "jobs")] == [0, 1, 2]
    assert not jobs[1].failure.exists()
