"""Places in a record that travels with its folder: neither paths of this machine nor names of its users."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from census_scvi.files.uri import local_path


def recorded(place: str, folder: Path) -> str | None:
    """A location as it is recorded in a folder.

    Parameters
    ----------
    place
        Path or URL.
    folder
        Folder of the record.

    Returns
    -------
    A URL as it is; a path from the folder, which stays right when both are moved together; None where they have nothing
    in common but the root of the disk or the users' folders.
    """
    path = local_path(place)
    if path is None:
        return place
    here, there = folder.absolute(), path.absolute()
    common = Path(os.path.commonpath([here, there]))
    return None if common in (Path("/"), Path.home().parent) else os.path.relpath(there, here)


def resolved(place: str | None, folder: Path) -> str | None:
    """The location that a record in a folder states; None if it states none."""
    if not place:
        return None
    path = local_path(place)
    return place if path is None or path.is_absolute() else os.path.normpath(folder.absolute() / path)


def without_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings or a stage's record, of any depth, with every absolute path as `recorded` says."""
    return {key: _without_paths(value, folder) for key, value in values.items()}


def _without_paths(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return without_paths(value, folder)
    if isinstance(value, str) and value.startswith(("/", "file:/")):
        return recorded(value, folder)
    return value
