"""Where things lie: on a disk of this machine, or elsewhere; and what of that may be written down.

A place is a path or a URL. TileDB and fsspec take the path of a file URL as it is written, without decoding it: to
them %20 is three characters, and Path.as_uri() names another folder.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from census_scvi.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]*://")
_FILE_URL = re.compile(r"file://(?:localhost)?(?=/)", re.IGNORECASE)
# Where tiledbsoma cuts the path of a group before it makes a member of it: urllib.parse takes the rest for a query, a
# fragment or parameters, or removes it.
_CUT_BY_SOMA = re.compile(r"[?#;\t\r\n]")


def local_path(place: str) -> Path | None:
    """The path of a place on a disk; None for a URL that leads elsewhere.

    The path of a file URL is taken as written, as TileDB and fsspec take it, or decoded where only that exists.
    """
    if url := _FILE_URL.match(place):
        written = place[url.end() :]
        decoded = unquote(written)
        return Path(decoded if os.path.lexists(decoded) and not os.path.lexists(written) else written)
    return None if _URL.match(place) else Path(place)


def absolute(place: str) -> str:
    """The same place whatever the current folder is: for TileDB, and for records."""
    path = local_path(place)
    if path is None:
        return place
    return f"file://{path}" if _FILE_URL.match(place) else str(path.absolute())


def tiledb_place(place: str, what: str) -> str:
    """The same as `absolute`; UserError where TileDB cannot open a folder of that name, `what` says which setting."""
    path = local_path(place)
    if path is not None:
        if path.name.endswith(":"):
            raise UserError(f"{what} {place}: TileDB cannot open a folder whose name ends with ':'; rename it")
        if "\0" in place or place != place.encode(errors="replace").decode():
            raise UserError(f"{what} {place!a}: TileDB opens only folders whose names are UTF-8; rename the folder")
    return absolute(place)


def file_system(place: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of a place, and the path in it. fsspec itself would split a path at `::`."""
    import fsspec

    path = local_path(place)
    return fsspec.url_to_fs(place) if path is None else (fsspec.filesystem("file"), str(path.absolute()))


@contextmanager
def plain_name(folder: Path) -> Iterator[Path]:
    """A folder, or a link to it where tiledbsoma would cut its path on making members of a group in it."""
    if not _CUT_BY_SOMA.search(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        link = Path(scratch) / "folder"
        link.symlink_to(folder, target_is_directory=True)
        yield link


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
