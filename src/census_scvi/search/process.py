"""The process of a trial: its environment, its cost, and how it ended."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from census_scvi.cluster.process import ForkedProcess
from census_scvi.config.run_names import LOCK
from census_scvi.search.trials import FAILED, FINISHED, LOG, Trial
from census_scvi.workspace.identity import cache_folder

# Trains and measures a trial, and returns the exit code.
Work = Callable[[Trial], int]


@dataclass(frozen=True)
class Job:
    """How the process of a trial is run.

    Attributes
    ----------
    work
        Its work.
    preload
        Modules that the server imports, so that a trial does not have to.
    cwd
        The current folder of the search, to which paths in the config are relative.
    cpus, gpus
        Cores and GPUs of a trial.
    """

    work: Work
    preload: tuple[str, ...]
    cwd: str
    cpus: int
    gpus: float


class TrialProcess:
    """A running process of a trial."""

    def __init__(self, trial: Trial, job: Job) -> None:
        self.trial = trial
        self._process = ForkedProcess(
            partial(_run, trial, job),
            trial.folder / LOG,
            cwd=Path(job.cwd),
            preload=job.preload,
            environment=_environment(job),
        )

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.running

    def wait(self, seconds: float) -> None:
        """Wait for its end, at most this time."""
        self._process.wait(seconds)

    def stop(self) -> None:
        """Stop it as SIGTERM stops the command; after some seconds, kill it."""
        self._process.stop()

    def record_end(self) -> None:
        """Record how an ended process ended: finished or failed, unless a signal to stop ended it."""
        code = self._process.exit_code
        if code == 0:
            self.trial.end(FINISHED)
        elif code not in (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT):
            self.trial.end(FAILED, self._process.failure)


def _environment(job: Job) -> dict[str, str]:
    """Threads of a trial, and a cache on disk for what scib-metrics compiles, which each process would compile."""
    jax = {
        "JAX_COMPILATION_CACHE_DIR": str(cache_folder() / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    own = {"OMP_NUM_THREADS": str(job.cpus)} | ({} if job.gpus else {"CUDA_VISIBLE_DEVICES": ""})
    return own | {name: os.environ.get(name, value) for name, value in jax.items()}


def _wait_for_lock(path: Path) -> None:
    """Wait until a process that a killed search left behind has ended; it ends with its parent."""
    with suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def _run(trial: Trial, job: Job) -> int:
    """Run in the new process."""
    _wait_for_lock(trial.folder / LOCK)
    started = time.monotonic()
    try:
        code = job.work(trial)
    finally:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = time.monotonic() - started
        unit = 1 if sys.platform == "darwin" else 1024
        trial.add_cost(seconds, used.ru_utime + used.ru_stime, seconds * job.gpus, used.ru_maxrss * unit)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
