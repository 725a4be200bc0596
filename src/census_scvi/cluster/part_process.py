"""The process of a part: how it is started, its time limit, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from census_scvi.cluster.pool import Failure
from census_scvi.cluster.process import DISK_FULL, USER_ERROR, ForkedProcess
from census_scvi.files.parts import Part


@dataclass(frozen=True)
class PartWork:
    """How a part is done.

    Attributes
    ----------
    work
        Does a part in a process of its own and returns the exit code; it can be pickled.
    logs
        Folder for the output of each part, absolute.
    preload
        Modules that the server of forks imports.
    environment
        Variables that the environment of the process has in addition.
    minutes
        Time limit.
    cwd
        Current folder, to which paths in the config are relative.
    """

    work: Callable[[Part], int]
    logs: Path
    preload: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    minutes: float | None = None
    cwd: Path = field(default_factory=Path.cwd)


class PartProcess:
    """The running process of a part."""

    def __init__(self, how: PartWork, part: Part) -> None:
        self._how, self._started, self._late = how, time.monotonic(), False
        output = how.logs / part.name("part.log")
        self._process = ForkedProcess(
            partial(how.work, part), output, cwd=how.cwd, preload=how.preload, environment=how.environment
        )
        self.sentinel = self._process.sentinel
        self.terminate, self.stop = self._process.terminate, self._process.stop

    @property
    def seconds_left(self) -> float | None:
        """Seconds until its time limit; None: it has none."""
        if self._how.minutes is None:
            return None
        return max(self._started + 60 * self._how.minutes - time.monotonic(), 0.0)

    def ended(self) -> bool:
        """Whether it has ended; it is stopped at its time limit."""
        if self._process.running and self.seconds_left == 0:
            self._late = True
            self.stop()
        return not self._process.running

    def wait(self) -> None:
        """Wait until it ends, at most until its time limit."""
        while not self.ended():
            self._process.wait(self.seconds_left)

    def failure(self) -> Failure | None:
        """Why it failed; None: the part is done."""
        self._process.wait()
        if self._process.exit_code == 0:
            return None
        if self._late:
            return Failure(f"took longer than {self._how.minutes:g} minutes (cluster.part_minutes)", again=True)
        return Failure(self._process.failure, again=self._process.exit_code not in (USER_ERROR, DISK_FULL))


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables for the number of threads of torch and numba."""
    return {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
