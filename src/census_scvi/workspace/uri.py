"""Where things lie: on a disk of this machine, or elsewhere; and what of that may be written down."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse


def local_path(uri: str) -> Path | None:
    """The path of a local URI; None for another."""
    parts = urlparse(uri)
    if parts.scheme not in ("", "file"):
        return None
    return Path(parts.path)


def absolute(uri: str) -> str:
    """The same place whatever the current folder is."""
    return uri if urlparse(uri).scheme else str(Path(uri).absolute())


def leaves_folder(name: str) -> bool:
    """Whether a name that should be relative to a folder points out of it."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def without_credentials(values: Any) -> Any:
    """The same with what could open a door taken out of every URL: user and password, signed query.

    Parameters
    ----------
    values
        A string, or lists and mappings of any depth that hold some; everything else stays as it is.
    """
    if isinstance(values, str):
        return _QUERY.sub(r"\1?***", _USER.sub(r"\1***@", values))
    if isinstance(values, dict):
        return {key: without_credentials(value) for key, value in values.items()}
    if isinstance(values, list):
        return [without_credentials(value) for value in values]
    return values


_USER = re.compile(r"(\w://)[^/@\s]+@")
_QUERY = re.compile(r"(\w://[^\s?]+)\?\S+")
