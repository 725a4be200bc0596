"""Logging, exit codes and one-line errors of a command, and of a part in a process of its own."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from census_scvi.errors import UserError
from census_scvi.terminal.printing import on_one_line, printable
from census_scvi.terminal.stopping import Stopped, Stopping, say

DONE, DEFECT, USER_ERROR = 0, 1, 2


class ReportedError(Exception):
    """The command ends with an exit code; another process of it has printed why.

    Attributes
    ----------
    exit_code
        The exit code.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"a process of this command has printed its error, and ended with exit code {exit_code}")
        self.exit_code = exit_code


def guarded(work: Callable[[], None], *, says_how_to_resume: bool = True) -> int:
    """Run `work` and return the exit code; a UserError prints one line on stderr, a defect prints a traceback.

    After a stop signal (Ctrl-C, SIGTERM, SIGHUP), the exit code is 128 + its number, and a line tells how to resume,
    unless the process that waits for this one prints it.
    """
    configure_logging()
    stopping = Stopping()
    try:
        with stopping:
            work()
    except KeyboardInterrupt:  # raised without a signal
        stopping.exit_code = 128 + signal.SIGINT
    except (Stopped, SystemExit, Exception) as error:
        if not stopping.exit_code:
            return _exit_code(error)
    if stopping.exit_code and says_how_to_resume:  # a library may have replaced the exception of the signal
        say(stopping.line)
    return stopping.exit_code


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, ReportedError):
        return error.exit_code
    if isinstance(error, UserError):
        return fail(str(error))
    if message := _storage_problem(error):
        return fail(message)
    print(printable("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    return DEFECT


class _Printable(logging.Formatter):
    """Formatter that removes credentials and escapes terminal control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one safe line."""
        return printable(super().format(record))


def configure_logging() -> None:
    """Log this project's messages with the time to stderr; of libraries, log only warnings and errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(asctime)s %(message)s", "%H:%M:%S"))
    project = logging.getLogger("census_scvi")
    project.handlers = [handler]
    project.setLevel(logging.INFO)
    project.propagate = False
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "cellxgene_census", "scvi"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Appended, so that PYTHONWARNINGS and the tests, which turn warnings into errors, take precedence.
    warnings.filterwarnings("ignore", category=FutureWarning, append=True)  # addressed to developers of the libraries
    # Not a problem here: genes are matched by their ids, which are checked.
    warnings.filterwarnings("ignore", "Variable names are not unique", UserWarning, append=True)


def fail(message: str) -> int:
    """Print an error on one line; returns the exit code."""
    print(f"error: {on_one_line(message)}", file=sys.stderr)
    return USER_ERROR


# Before the run directory, in a note of an exception.
IN_FOLDER = "run directory: "
_HDF5_FILE = re.compile(r"filename = '([^']*)'")


def _free_space(error: BaseException, cause: BaseException) -> str:
    """Free space on the disk of the failed file (or of the run directory), and for temporary files."""
    notes = [note.removeprefix(IN_FOLDER) for note in getattr(error, "__notes__", []) if note.startswith(IN_FOLDER)]
    named = _HDF5_FILE.search(str(cause))
    file = getattr(cause, "filename", None) or (named[1] if named else None)
    place = Path(os.fsdecode(file)).parent if isinstance(file, str | bytes) else Path(notes[0] if notes else ".")
    folders = {folder.stat().st_dev: folder for folder in (Path(tempfile.gettempdir()), _existing(place.absolute()))}
    free = {folder: shutil.disk_usage(folder).free for folder in reversed(folders.values())}
    return ", ".join(f"{number / 1e6:,.1f} MB in {folder}" for folder, number in free.items())


def _existing(folder: Path) -> Path:
    """The folder, or its nearest existing parent."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _storage_problem(error: BaseException) -> str | None:
    """Message for a full disk, missing permission or read-only file system, anywhere in the chain of causes."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        number = getattr(seen, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text or "errno = 28" in text:
            return (
                f"the disk is full ({text.splitlines()[0]}; {_free_space(error, seen)} free): free some space or choose"
                " another output.directory, and run the same command again; nothing is lost"
            )
        if isinstance(seen, PermissionError):
            return f"{seen.filename or text}: no permission to write or read there"
        if isinstance(seen, OSError) and number == errno.EROFS:
            return f"{seen.filename or text}: the file system is read-only"
        seen = seen.__cause__ or seen.__context__
    return None
