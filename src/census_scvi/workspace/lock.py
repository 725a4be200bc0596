"""One run a directory at a time, and the second is told who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from census_scvi.errors import UserError


@contextmanager
def directory_lock(path: Path, stage: str) -> Iterator[None]:
    """Hold an exclusive lock on a file while the block runs; the kernel drops it when the process dies.

    Raises
    ------
    UserError
        Another process holds it: stage, process id, host and since when.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path.parent} is in use by {_holder(path)}; wait for it or stop it") from None
        file.seek(0)
        file.truncate()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        json.dump({"stage": stage, "pid": os.getpid(), "host": platform.node(), "since": started}, file)
        file.flush()
        yield


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"{holder['stage']} (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError):
        return "another run"
