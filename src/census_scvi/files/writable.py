"""Check that a result can be written to the location of a setting, before the result is computed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from census_scvi.errors import UserError
from census_scvi.files.atomic import partial_of

_LONGEST_NAME = 255  # bytes, if the file system does not report its limit


def require_writable(path: Path, setting: str) -> None:
    """UserError if a file cannot be created or replaced at a path; nothing is written."""
    _require_parent(path, setting)
    kind = _kind(path, setting)
    if kind is not None and stat.S_ISDIR(kind):
        raise UserError(f"{setting}: {path} is a folder; give a file, for example {path / 'name.h5ad'}")
    if kind is not None and not stat.S_ISREG(kind):
        raise UserError(f"{setting}: {path} is not a regular file; give another")


def require_writable_folder(folder: Path, names: list[str], setting: str) -> None:
    """UserError if files with these names cannot be written in a folder, which may not exist yet."""
    kind = _kind(folder, setting)
    if kind is None:
        above = folder.parent
        while (kind := _kind(above, setting)) is None and above != above.parent:
            above = above.parent
        _require_folder(above, kind, setting)
        for part in (folder, *folder.parents):
            _require_short(part, above, setting)
        return
    _require_folder(folder, kind, setting)
    for name in names:
        require_writable(folder / name, setting)


def _require_parent(path: Path, setting: str) -> None:
    kind = _kind(path.parent, setting)
    if kind is None:
        raise UserError(f"{setting}: {path.parent} does not exist; create the folder first")
    _require_folder(path.parent, kind, setting)
    _require_short(partial_of(path), path.parent, setting)


def _require_folder(folder: Path, kind: int | None, setting: str) -> None:
    if kind is None or not stat.S_ISDIR(kind):
        raise UserError(f"{setting}: {folder} is a file, not a folder; give another location")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{setting}: no permission to write in {folder}; give another location")


def _kind(path: Path, setting: str) -> int | None:
    """File mode, with links followed; None if the path does not exist."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None  # a parent is a file, which the check of the parent reports
    except (OSError, ValueError) as error:  # a loop of links, a name too long, no permission, a null byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{setting}: {path} cannot be used ({reason}); give another location") from None


def _require_short(path: Path, folder: Path, setting: str) -> None:
    try:
        longest = os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        longest = _LONGEST_NAME
    if len(os.fsencode(path.name)) > longest:
        raise UserError(f"{setting}: the name {path.name[:40]}... is too long; at most {longest} bytes are possible")
