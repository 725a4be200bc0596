"""Several processes of one training: the first holds the run directory, the others wait until it opens the training.

Processes that a launcher starts on several nodes begin at the same time. What lies in the run directory then may be of
an earlier run that the first process will resume, refuse or replace: the others read nothing before it says so.
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

# Seconds between two signs of life of the first process, and how long the others wait for one.
_BEAT, PATIENCE = 1.0, 600.0
_LOOK = 0.2

_PREPARING, _OPEN, _ENDED = "preparing", "open", "ended"


class FirstProcess:
    """What the first process tells the others.

    Parameters
    ----------
    path
        A file in the run directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Give signs of life while the block runs, and then say how it ended."""
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
        """Let the others in: what lies in staging is what they train with."""
        self._tell(_OPEN)

    def wait(self) -> bool:
        """Wait, as another process of the training, until the first opens it; False where it ended and all was done.

        Raises
        ------
        UserError
            The first process ended with an error, or gives no sign of life.
        """
        # What was written before this process started is of an earlier training.
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
    """When this process started, seconds since 1970; where the system does not say, not before it used its CPU time."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time() - time.process_time()
