"""Locations in records that are moved with their folder: no absolute paths, no user names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from census_scvi.files.uri import local_path


def recorded(place: str, folder: Path) -> str | None:
    """A location in the form in which a record in a folder contains it.

    Parameters
    ----------
    place
        Path or URL.
    folder
        Folder of the record.

    Returns
    -------
    A URL unchanged; a path relative to the folder, which stays valid if both are moved together; None if the two paths
    share only the root or the parent of the home folders.
    """
    path = local_path(place)
    if path is None:
        return place
    here, there = folder.absolute(), path.absolute()
    common = Path(os.path.commonpath([here, there]))
    return None if common in (Path("/"), Path.home().parent) else os.path.relpath(there, here)


def resolved(place: str | None, folder: Path) -> str | None:
    """Convert a recorded location in a folder to a URL or an absolute path; None if there is none."""
    if not place:
        return None
    path = local_path(place)
    return place if path is None or path.is_absolute() else os.path.normpath(folder.absolute() / path)


def without_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Apply `recorded` to every absolute path in settings or in the record of a stage, at any depth."""
    return {key: _without_paths(value, folder) for key, value in values.items()}


def _without_paths(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return without_paths(value, folder)
    if isinstance(value, list):
        return [_without_paths(each, folder) for each in value]
    if isinstance(value, str) and value.startswith(("/", "file:/")):
        return recorded(value, folder)
    return value
