"""A folder next to a result in which it is made, held by a lock."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from census_scvi.errors import UserError
from census_scvi.files.atomic import partial_of, remove
from census_scvi.files.lock import directory_lock

log = logging.getLogger(__name__)

# In the folder: the lock, and what stood in the place of the new result.
_LOCK, OLD = "build.lock", "old"


@contextmanager
def partial_folder(target: Path, holder: str) -> Iterator[Path]:
    """An empty folder `<target>.partial`, held by a lock; removed at the end.

    What a killed run moved aside, as `OLD`, to put a new result in its place is put back first.

    Parameters
    ----------
    target
        Where the result will be.
    holder
        Who makes it, for whoever meets the lock.

    Raises
    ------
    UserError
        Another process makes it, or something else has that name.
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
