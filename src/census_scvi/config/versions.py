"""Versions of installed packages."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def version(package: str) -> str:
    """Version of an installed package, read once per process: its metadata take milliseconds to parse.

    Raises
    ------
    PackageNotFoundError
        The package is not installed.
    """
    return metadata.version(package)
