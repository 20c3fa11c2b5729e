"""A launcher of hydra that does the jobs of a sweep as tasks of Ray: hydra/launcher=ray.

In place of hydra-ray-launcher, whose last release (1.2.2) does not work with current releases of Ray. hydra
finds launchers in packages of this name.
"""

import importlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals

from distill.runtime.errors import UserError


@dataclass
class RayOptions:
    """Where Ray runs, and what each job takes of it."""

    _target_: str = "hydra_plugins.ray_tasks.RayLauncher"
    address: str | None = None  # of a cluster's head, or auto; null: a head on this machine, for this sweep
    workers: int | None = None  # cores of that head; null: those of the machine
    cpus_per_job: float = 1.0
    gpus_per_job: float = 0.0
    retries: int = 3  # of a job whose worker or node dies; it resumes from its last checkpoint


class RayLauncher(BasicLauncher):
    """Every job is a task; a worker runs it as hydra's own launcher would."""

    def __init__(
        self, address: str | None, workers: int | None, cpus_per_job: float, gpus_per_job: float, retries: int
    ) -> None:
        """As of `RayOptions`; hydra gives all of them."""
        super().__init__()
        self.address, self.retries = address, retries
        self.resources = {"num_cpus": cpus_per_job, "num_gpus": gpus_per_job}
        self.head = {"num_cpus": workers, "include_dashboard": False} if address is None else {}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Do all jobs, and wait for them. A worker that dies again and again ends its own job alone."""
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError:
            raise UserError("hydra/launcher=ray needs Ray: pip install ray") from None
        from sweep import FAILURES, record_failure

        names = ("PYTHONPATH", FAILURES, "HF_HUB_OFFLINE")
        environment = {name: os.environ[name] for name in names if name in os.environ}
        ray.init(self.address, runtime_env={"env_vars": environment}, logging_level="warning", **self.head)
        try:
            task = ray.remote(max_retries=self.retries, **self.resources)(run_job)
            parts = (self.hydra_context, self.config, self.task_function, Singleton.get_state(), os.getcwd())
            shared = ray.put(parts)
            tasks = [
                task.remote(shared, list(overrides), initial_job_idx + index)
                for index, overrides in enumerate(job_overrides)
            ]
            results = []
            for overrides, result in zip(job_overrides, tasks, strict=True):
                try:
                    results.append(ray.get(result))
                except ray.exceptions.RayError as error:
                    job = ", ".join(filter_overrides(overrides))
                    record_failure(f"{job}: its worker died ({str(error).splitlines()[0]})")
                    results.append(JobReturn(overrides=overrides, status=JobStatus.COMPLETED))
            return results
        finally:
            ray.shutdown()


def run_job(parts: tuple[Any, ...], overrides: list[str], index: int) -> JobReturn:
    """One job, in a worker. parts: hydra's context, config, task and state, and the working directory."""
    context, config, task_function, state, directory = parts
    os.chdir(Path(directory))
    setup_globals()
    Singleton.set_state(state)
    launcher = BasicLauncher()
    launcher.setup(hydra_context=context, task_function=task_function, config=config)
    return launcher.launch([overrides], index)[0]


ConfigStore.instance().store(group="hydra/launcher", name="ray", node=asdict(RayOptions()), provider="sds3d")
