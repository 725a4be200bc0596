"""A process that is forked from a server with imported libraries, and that ends with the process that started it."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

from census_scvi.terminal.printing import on_one_line

# Exit codes: of an error that the user can fix, and of a process that could not write its output.
USER_ERROR, DISK_FULL = 2, 74

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
_GRACE_SECONDS = 15.0
_NOTE = "run directory: "  # below the traceback of a defect


class ForkedProcess:
    """A running process.

    Parameters
    ----------
    work
        Its work, which returns the exit code; it can be pickled.
    output
        File to which what it prints is appended; None: it prints where this process does.
    cwd
        Its current folder.
    preload
        Modules that the server of forks imports.
    environment
        Variables that its environment and that of the server have in addition to those of this process.
    """

    def __init__(
        self,
        work: Callable[[], int],
        output: Path | None,
        *,
        cwd: Path,
        preload: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._output = output
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", *preload])
        with _variables(environment or {}):  # read by the libraries that the server imports
            _start_server()
            self._process = context.Process(target=_run, args=(work, output, cwd, dict(os.environ)))
            self._process.start()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.is_alive()

    @property
    def exit_code(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    @property
    def sentinel(self) -> int:
        """Handle for `multiprocessing.connection.wait` that is ready when it has ended."""
        return self._process.sentinel

    @property
    def failure(self) -> str:
        """Why it failed, in one line."""
        return failure(self.exit_code, self._output)

    def wait(self, seconds: float | None = None) -> None:
        """Wait for its end, at most this time."""
        self._process.join(seconds)

    def terminate(self) -> None:
        """Ask it to stop, as SIGTERM stops a command."""
        self._process.terminate()

    def stop(self) -> None:
        """Ask it to stop; after some seconds, kill it."""
        self._process.terminate()
        self._process.join(_GRACE_SECONDS)
        self._process.kill()
        self._process.join()


def failure(code: int | None, output: Path | None) -> str:
    """Why a process failed, in one line: the signal that killed it, or the last line of its output."""
    if code == -signal.SIGKILL:
        return "killed by signal 9, probably because the memory of the machine was full"
    if code is not None and code < 0:
        return f"killed by signal {-code}"
    if output is None:
        return f"ended with exit code {code}"
    if code == DISK_FULL:
        return f"the disk of {output.parent} is full; free some space, and run the same command again; nothing is lost"
    text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(_NOTE)]
    return on_one_line(lines[-1]).removeprefix("error: ") if lines else f"ended with exit code {code}"


def _start_server() -> None:
    """Start the server of forks, if it does not run, so that Ctrl-C is only for this process, which stops the others.

    A server that imports would print a traceback.
    """
    here = threading.current_thread() is threading.main_thread()  # only this thread can handle signals in Python
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if here else None
    try:
        forkserver.ensure_running()
    finally:
        if here:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)


@contextmanager
def _variables(added: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment while the block runs."""
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def _run(work: Callable[[], int], output: Path | None, cwd: Path, environment: dict[str, str]) -> None:
    """Run in the new process."""
    _end_with_the_parent()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    try:
        if output is not None:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
        code = work()
    except OSError as error:  # the command could not even print its own error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        os._exit(DISK_FULL)
    sys.exit(code)


def _end_with_the_parent() -> None:
    """End this process when the one that started it has ended: it would hold locks.

    On Linux the kernel does it, also in the call of a library that blocks Python's threads: the server of forks ends
    with its parent, and this process with the server.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    threading.Thread(target=_kill_after_the_parent, daemon=True, name="parent").start()


def _kill_after_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)
