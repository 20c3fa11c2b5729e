"""Rows of figures on disk, computed only where they do not answer a query yet, by any number of processes."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distill.runtime.errors import UserError
from distill.runtime.files import read_json, write_json
from distill.runtime.locks import claimed

POLL = 2.0  # seconds between two looks at what other processes are at work on


@dataclass(frozen=True)
class RowJob:
    """A row that may be on the disk, at `path`, and how it is computed: `{**query, **compute()}`.

    query: what the figures depend on (weights, data, options, seed), as plain JSON values.
    """

    path: Path
    query: Mapping[str, Any]
    compute: Callable[[], Mapping[str, Any]]

    def read(self) -> dict[str, Any] | None:
        """The row, where it answers the query."""
        row = read_json(self.path) if self.path.is_file() else {}
        plain = json.loads(json.dumps(self.query))
        differs = not row or any(name not in row or row[name] != value for name, value in plain.items())
        return None if differs else row

    def run(self) -> dict[str, Any]:
        """Compute and write the row."""
        write_json(self.path, {**json.loads(json.dumps(self.query)), **self.compute()})
        return read_json(self.path)

    @property
    def failure(self) -> Path:
        """Where a process writes why it could not compute the row."""
        return self.path.with_suffix(".failed.json")


def cached_row(
    path: Path, query: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """The row at `path` where it holds the same query; else it is computed, and written there first."""
    job = RowJob(path, query, compute)
    row = job.read()
    return job.run() if row is None else row


def shared_rows(jobs: Sequence[RowJob], label: str) -> list[dict[str, Any]]:
    """The rows of all jobs, in their order.

    Any number of processes may be given the same jobs at the same time. Each computes those that no other one
    is at work on, and then waits for the others; jobs of a process that was killed are taken over. A mistake
    (`UserError`) ends its own job alone; at the end one is raised that names the failed ones.
    """
    started, rows, failed = time.time(), dict[int, dict[str, Any]](), dict[int, str]()
    with tqdm(total=len(jobs), desc=label, unit="run") as bar:
        while len(rows) + len(failed) < len(jobs):
            before = bar.n
            for index, job in enumerate(jobs):
                if index not in rows and index not in failed:
                    _attempt(index, job, rows, failed, started)
                    bar.update(len(rows) + len(failed) - bar.n)
            if bar.n == before:
                time.sleep(POLL)
    if failed:
        first = min(failed)
        raise UserError(
            f"{len(failed)} of {len(jobs)} runs failed, the first in {jobs[first].path.parent} "
            f"({failed[first]}): the others are done, give the same command again to try these once more"
        )
    return [rows[index] for index in range(len(jobs))]


def _attempt(
    index: int, job: RowJob, rows: dict[int, dict[str, Any]], failed: dict[int, str], started: float
) -> None:
    """Read or compute one row, unless another process is at work on it."""
    row = job.read()
    if row is None:
        with claimed(job.path.with_suffix(".lock")) as mine:
            if not mine:
                return
            row = job.read()  # another process may have finished it in the meantime
            failure = read_json(job.failure) if job.failure.is_file() else {}
            if row is None and failure.get("time", 0.0) >= started:
                failed[index] = str(failure["error"])
                return
            if row is None:
                row = _run(index, job, failed)
    if row is not None:
        rows[index] = row


def _run(index: int, job: RowJob, failed: dict[int, str]) -> dict[str, Any] | None:
    """Compute a row; None where that is a mistake, which the other processes are told of."""
    try:
        row = job.run()
    except UserError as error:
        failed[index] = str(error)
        write_json(job.failure, {"error": str(error), "time": time.time(), "process": os.getpid()})
        return None
    job.failure.unlink(missing_ok=True)
    return row
