"""Worker processes on this machine: each does one part of the work."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from census_scvi.cluster.part_process import PartProcess, PartWork, thread_variables
from census_scvi.cluster.pool import Failure, Pool
from census_scvi.files.parts import Part


@dataclass(frozen=True)
class Workers(Pool[PartProcess]):
    """Processes of this machine that do parts, see `Pool.do`.

    Attributes
    ----------
    work
        Does a part in the worker's process and returns the exit code; it can be pickled.
    number
        Processes at a time.
    logs
        Folder for the output of each part.
    preload
        Modules that the server of forks imports.
    minutes
        Time limit of a part.
    """

    work: Callable[[Part], int]
    number: int
    logs: Path
    preload: tuple[str, ...] = ()
    minutes: float | None = None

    def _start(self, part: Part) -> PartProcess:
        threads = thread_variables(threads_of_each(self.number))
        return PartProcess(PartWork(self.work, self.logs.absolute(), self.preload, threads, self.minutes), part)

    def _ended(self, running: Mapping[PartProcess, Part]) -> dict[PartProcess, Failure | None]:
        left = [seconds for process in running if (seconds := process.seconds_left) is not None]
        wait([process.sentinel for process in running], min(left, default=None))
        return {process: process.failure() for process in running if process.ended()}

    def _stop(self, running: Sequence[PartProcess]) -> None:
        for process in running:
            process.terminate()
        for process in running:
            process.stop()


def threads_of_each(workers: int) -> int:
    """Threads of each worker, so that together they use the cores of this machine."""
    return max((os.cpu_count() or 1) // workers, 1)
