"""Directory locks: one run per directory at a time; the error of a second run describes the first one."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from census_scvi.errors import UserError
from census_scvi.files.json_file import read_json

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
# Errors of NFS without its lock service, and of file systems without locks.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def directory_lock(path: Path, stage: str, *, shared: bool = False, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock on a file while the block runs, alone or `shared`; the kernel releases it when the process ends.

    Parameters
    ----------
    path, stage
        The file, and the name of the holder for errors of others.
    shared
        Hold it together with others.
    patience
        Seconds to wait for another process that is ending.

    Raises
    ------
    UserError
        Another process holds the lock (the error has stage, process id, host and time), the file system does not
        support locks, or the path is not a regular file.
    """
    with opened(path) as file:
        try:
            _acquire(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, path, patience)
        except BlockingIOError:
            raise UserError(f"{path.parent} is in use by {_holder(path)}; wait for it or stop it") from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            raise UserError(
                f"the file system of {path.parent} does not support file locks ({error.strerror}), and two runs"
                " at once would damage"
                " each other's results; use a folder on another file system, or ask for its lock service to be started"
            ) from None
        file.seek(0)
        file.truncate()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        json.dump({"stage": stage, "pid": os.getpid(), "host": platform.node(), "since": started}, file)
        file.flush()
        yield


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold a lock on a file alone while the block runs, after those who hold it before."""
    with opened(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _acquire(file: TextIO, kind: int, path: Path, patience: float) -> None:
    """Lock the file; BlockingIOError if others hold it longer than for `patience` seconds."""
    last, said = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= last:
                raise
            if not said:
                log.info("%s is in use by %s: waiting up to %d s for its end", path.parent, _holder(path), patience)
                said = True
            time.sleep(_POLL_SECONDS)


def opened(path: Path) -> TextIO:
    """Open the file, or create it. A link is not followed, because its target would be truncated."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO):
            raise
        raise _no_file(path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_file(path)
    return os.fdopen(descriptor, "r+", encoding="utf-8")


def _no_file(path: Path) -> UserError:
    what = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "no plain file"
    return UserError(f"{path} is {what}, expected a lock file; remove it")


def _holder(path: Path) -> str:
    try:
        holder = read_json(path)
        return f"{holder['stage']} (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
