"""Synchronization of several training processes: the first locks the run directory, the others wait for its signal.

A launcher starts the processes on all nodes at the same time. The run directory may then hold an earlier run, which the
first process will resume, refuse or replace. Therefore the others read nothing before its signal.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from census_scvi.errors import UserError
from census_scvi.files.atomic import write_json
from census_scvi.files.json_file import read_json

# Heartbeat interval of the first process, and timeout of the others without a heartbeat, in seconds.
_BEAT, PATIENCE = 1.0, 600.0
_LOOK = 0.2

_PREPARING, _OPEN, _ENDED = "preparing", "open", "ended"


class FirstProcess:
    """Signals from the first process to the others, through a file.

    Parameters
    ----------
    path
        The file, in the run directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Write heartbeats while the block runs, then record how it ended."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._tell(_PREPARING)
        over = threading.Event()
        beat = threading.Thread(target=self._beat, args=(over,), name="first process", daemon=True)
        beat.start()
        reason: str | None = "it was stopped"
        try:
            yield
            reason = None
        except UserError as error:
            reason = str(error)
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            over.set()
            beat.join()
            self._tell(_ENDED, reason)

    def open(self) -> None:
        """Let the other processes start: staging now holds the state that they train with."""
        self._tell(_OPEN)

    def wait(self) -> bool:
        """Wait in another process until the first one opens the training; False if it ended because all was done.

        Raises
        ------
        UserError
            The first process ended with an error, or sent no heartbeat for `PATIENCE` seconds.
        """
        # A signal from before the start of this process belongs to an earlier training.
        began = _process_start()
        heard, last = time.monotonic(), 0.0
        while time.monotonic() - heard < PATIENCE:
            state, reason, when = self._told()
            if when >= began:
                if when != last:
                    heard, last = time.monotonic(), when
                if state == _OPEN:
                    return True
                if state == _ENDED and reason is None:
                    return False
                if state == _ENDED:
                    raise UserError(f"the first process of this training ended: {reason}")
            time.sleep(_LOOK)
        raise UserError(
            f"no first process of this training has given a sign of life in {self._path.parent.parent} for"
            f" {PATIENCE:,.0f} seconds; start the one of rank 0 with the same config, and see what it says"
        )

    def _tell(self, state: str, reason: str | None = None) -> None:
        write_json(self._path, {"state": state, "reason": reason})

    def _told(self) -> tuple[str, str | None, float]:
        try:
            when = self._path.stat().st_mtime
            told = read_json(self._path)
            return str(told["state"]), told["reason"], when
        except (OSError, ValueError, KeyError, TypeError):
            return "", None, 0.0

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(_BEAT):
            self._path.touch()


def _process_start() -> float:
    """Start of this process, seconds since 1970; without /proc an upper limit: now minus the CPU time used."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time() - time.process_time()
