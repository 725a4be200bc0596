"""A temporary folder, next to a result, in which the result is created under a lock."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from census_scvi.errors import UserError
from census_scvi.files.atomic import partial_of, remove
from census_scvi.files.lock import directory_lock

log = logging.getLogger(__name__)

# Names in the folder: the lock file, and the previous result while it is replaced.
_LOCK, OLD = "build.lock", "old"


@contextmanager
def partial_folder(target: Path, holder: str) -> Iterator[Path]:
    """Create an empty folder `<target>.partial` under a lock, and remove it at the end.

    If a killed run moved the previous result to `OLD` and did not replace it, the previous result is restored first.

    Parameters
    ----------
    target
        Path of the result.
    holder
        Name of the script that creates it, for the error of a second run.

    Raises
    ------
    UserError
        Another process creates the result, the folder cannot be written, or another file or folder has its name.
    """
    partial = partial_of(target)
    lock = partial / _LOCK
    try:
        foreign = partial.exists() and not partial.is_dir()
        if not foreign:
            partial.mkdir(parents=True, exist_ok=True)
            foreign = any(partial.iterdir()) and not lock.exists()
    except OSError as error:
        raise UserError(f"{target}: it cannot be written there ({error})") from error
    if foreign:
        raise UserError(f"{partial} exists and is not left of an earlier run, which needs that name: move it away")
    with directory_lock(lock, holder):
        if not target.exists() and (partial / OLD).exists():
            log.warning("a run was killed as it replaced %s: what was there before is put back", target)
            (partial / OLD).rename(target)
        for leftover in partial.iterdir():
            if leftover != lock:
                remove(leftover)
        try:
            yield partial
        finally:
            remove(partial)
