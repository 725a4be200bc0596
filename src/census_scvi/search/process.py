"""The process of a trial: forked from a server that has imported the libraries, and ended with its parent."""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from census_scvi.config.run_names import LOCK
from census_scvi.search.trials import FAILED, FINISHED, LOG, Trial
from census_scvi.terminal.printing import on_one_line
from census_scvi.workspace.identity import cache_folder

# Trains and measures a trial, and returns the exit code.
Work = Callable[[Trial], int]

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
_GRACE_SECONDS = 20.0
_NOTE = "run directory: "  # below the traceback of a defect


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
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", *job.preload])
        os.environ |= _environment(job.cpus)  # read by the libraries that the server imports
        self._process: BaseProcess = context.Process(target=_run, args=(trial, job, dict(os.environ)))
        self._process.start()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for its end, at most this time."""
        self._process.join(seconds)

    def stop(self) -> None:
        """Stop it as SIGTERM stops the command; after some seconds, kill it."""
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(_GRACE_SECONDS)
            self._process.kill()
        self._process.join()

    def record_end(self) -> None:
        """Record how an ended process ended: finished or failed, unless a signal to stop ended it."""
        code = self._process.exitcode
        if code == 0:
            self.trial.end(FINISHED)
        elif code not in (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT):
            self.trial.end(FAILED, failure(code, self.trial.folder / LOG))


def _environment(cpus: int) -> dict[str, str]:
    """Threads of a trial, and a cache on disk for what scib-metrics compiles, which each process would compile."""
    jax = {
        "JAX_COMPILATION_CACHE_DIR": str(cache_folder() / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return {"OMP_NUM_THREADS": str(cpus)} | {name: os.environ.get(name, value) for name, value in jax.items()}


def failure(code: int | None, log: Path) -> str:
    """Why a trial failed, in one line: the last line of its log, or the signal that killed it."""
    if code == -signal.SIGKILL:
        return "killed by signal 9, probably because the memory of the machine was full"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(_NOTE)]
    return on_one_line(lines[-1]).removeprefix("error: ") if lines else f"ended with exit code {code}"


def _wait_for_lock(path: Path) -> None:
    """Wait until a process that a killed search left behind has ended; it ends with its parent."""
    with suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def _run(trial: Trial, job: Job, environment: dict[str, str]) -> None:
    """Run in the new process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(environment)
    if not job.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(job.cwd)
    _wait_for_lock(trial.folder / LOCK)
    log = os.open(trial.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
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
