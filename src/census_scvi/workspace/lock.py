"""One run a directory at a time, and the second is told who holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from census_scvi.errors import UserError
from census_scvi.workspace.atomic import read_json

# NFS without its lock service, and file systems that know no locks.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def directory_lock(path: Path, stage: str) -> Iterator[None]:
    """Hold an exclusive lock on a file while the block runs; the kernel drops it when the process dies.

    Raises
    ------
    UserError
        Another process holds it: stage, process id, host and since when; or the file system has no locks, or a
        folder of that name is in the way.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, and the lock of {path.parent} is a file of that name; remove the folder")
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path.parent} is in use by {_holder(path)}; wait for it or stop it") from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            raise UserError(
                f"the file system of {path.parent} locks no files ({error.strerror}), and two runs at once would damage"
                " each other's results; use a folder on another file system, or have its lock service started"
            ) from None
        file.seek(0)
        file.truncate()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        json.dump({"stage": stage, "pid": os.getpid(), "host": platform.node(), "since": started}, file)
        file.flush()
        yield


def _holder(path: Path) -> str:
    try:
        holder = read_json(path)
        return f"{holder['stage']} (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
