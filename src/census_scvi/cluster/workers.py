"""Worker processes: each does one part of the work, forked from a server that has imported the libraries."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from census_scvi.errors import UserError
from census_scvi.files.parts import Part
from census_scvi.terminal.printing import on_one_line
from census_scvi.terminal.progress import progress_bar

log = logging.getLogger(__name__)

_MOST_TRIES = 3
_GRACE_SECONDS = 15.0
_USER_ERROR = 2


@dataclass(frozen=True)
class Workers:
    """How parts are done.

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
    """

    work: Callable[[Part], int]
    number: int
    logs: Path
    preload: tuple[str, ...] = ()
    _tries: Counter[Part] = field(default_factory=Counter)

    def do(self, parts: Sequence[Part], what: str) -> None:
        """Do all parts; a worker that is killed or ends with a defect is started up to three times.

        Parameters
        ----------
        parts
            The parts.
        what
            Name of the work, for the progress bar.

        Raises
        ------
        UserError
            A part cannot be done: the error is that of its process, and names the part.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        waiting, running = deque(parts), dict[Part, BaseProcess]()
        with _ended_with_the_block(running), progress_bar(len(parts), what, unit="parts") as bar:
            while waiting or running:
                while waiting and len(running) < self.number:
                    part = waiting.popleft()
                    running[part] = self._start(part)
                wait([process.sentinel for process in running.values()])
                for part in [part for part, process in running.items() if not process.is_alive()]:
                    if self._is_done(part, running.pop(part)):
                        bar.update(1)
                    else:
                        waiting.append(part)

    def _start(self, part: Part) -> BaseProcess:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", *self.preload])
        threads = str(threads_of_each(self.number))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
        place = (self.logs.absolute() / part.name("part.log"), Path.cwd(), environment)
        os.environ |= {"OMP_NUM_THREADS": threads}  # read by the libraries that the server imports
        process = context.Process(target=_run, args=(self.work, part, *place))
        process.start()
        return process

    def _is_done(self, part: Part, process: BaseProcess) -> bool:
        """Whether a process has done its part; UserError if it is not to be tried again."""
        process.join()
        if process.exitcode == 0:
            return True
        reason = _reason(process.exitcode, self.logs / part.name("part.log"))
        self._tries[part] += 1
        if process.exitcode == _USER_ERROR or self._tries[part] == _MOST_TRIES:
            raise UserError(f"{part}: {reason}; its output is in {self.logs / part.name('part.log')}")
        log.warning("%s is done again: %s", part, reason)
        return False


def threads_of_each(workers: int) -> int:
    """Threads of each worker, so that together they use the cores of this machine."""
    return max((os.cpu_count() or 1) // workers, 1)


@contextmanager
def _ended_with_the_block(running: dict[Part, BaseProcess]) -> Iterator[None]:
    """Stop the running processes at the end of the block, as SIGTERM stops a command."""
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(_GRACE_SECONDS)
            process.kill()
            process.join()


def _reason(code: int | None, output: Path) -> str:
    """Why a process failed: the signal that ended it, or the last line of its output."""
    if code is not None and code < 0:
        return f"killed by signal {-code}" + (", maybe because the memory was full" if code == -signal.SIGKILL else "")
    text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return on_one_line(lines[-1]).removeprefix("error: ") if lines else f"exit code {code}"


def _run(work: Callable[[Part], int], part: Part, output: Path, cwd: Path, environment: dict[str, str]) -> None:
    """Run in the new process."""
    threading.Thread(target=_end_with_the_parent, daemon=True, name="parent").start()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.exit(work(part))


def _end_with_the_parent() -> None:
    """Kill this process when the one that started it has ended: it would hold locks. Nothing but a block is lost."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)
