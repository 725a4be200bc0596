"""Locations, on a local disk or remote, and the form in which they may be recorded.

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
    """The path of a local location; None for a remote URL.

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
    """The same as `absolute`; UserError if TileDB cannot open a folder of that name; `what` is the setting."""
    path = local_path(place)
    if path is not None:
        if path.name.endswith(":"):
            raise UserError(f"{what} {place}: TileDB cannot open a folder whose name ends with ':'; rename it")
        if "\0" in place or place != place.encode(errors="replace").decode():
            raise UserError(f"{what} {place!a}: TileDB opens only folders whose names are UTF-8; rename the folder")
    return absolute(place)


def file_system(place: str, **options: Any) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of a place, and the path in it. fsspec itself would split a path at `::`.

    `options` are those of the file system of a URL, such as `key` and `secret`. ValueError: it is not a URL.
    """
    import fsspec

    if (path := local_path(place)) is not None:
        return fsspec.filesystem("file"), str(path.absolute())
    try:
        return fsspec.url_to_fs(place, **options)
    except ValueError:
        if without_credentials(place) == place:
            raise
        # The reason may quote a part of the password.
        raise ValueError("it is not a valid URL; in a password write / as %2F and @ as %40, or omit it") from None


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
    """The same without credentials: user and password of every URL, its query, secrets by name.

    If the end of a secret is unclear, too much is removed rather than too little: `://a:b/c@d/e@f`
    keeps `f` alone. Local paths, mail addresses and URLs without any of these stay as they are.

    Parameters
    ----------
    values
        A string, or lists and mappings of any depth that hold some; everything else stays as it is.
    """
    if isinstance(values, str):
        return _WORD.sub(_clean_word, values)
    if isinstance(values, dict):
        return {
            without_credentials(key): "***"
            if isinstance(value, str) and value and _SECRET_NAME.search(str(key))
            else without_credentials(value)
            for key, value in values.items()
        }
    if isinstance(values, list | tuple):
        return [without_credentials(value) for value in values]
    return values


_WORD = re.compile(r"\S+")
# Two slashes after a scheme, or where a word or a value begins; one, as pathlib writes them. `a//b` is a path.
_URL_START = re.compile(r"(?<![\w+.-])[A-Za-z][\w+.-]*:/{1,2}(?!/)|(?<![^\s\"'`(\[{<=,;|])//(?!/)")
_LOCAL = re.compile(r"file:/(?:/localhost)?(?:/(?=/))?", re.IGNORECASE)
# user:password@host without slashes, unlike mailto:name@host
_BARE = re.compile(r"(?<![\w/.:@%+-])(?!mailto:)[\w.%+-]+:[^\s:@/\"']+@(?=[\w\[])", re.IGNORECASE)
_ADDITION = re.compile(r"\?(?=\S*\w)|[#;&](?=\S*(?:=|%3[dD]))")
_SECRET_NAME = re.compile(
    r"secret|passw|passphrase|token(?!iz)|credential|signature|(?:api|access|account|private|shared|storage)_?key"
    r"|session_?id",
    re.IGNORECASE,
)
_NAMED = re.compile(rf"([\w.-]*(?:{_SECRET_NAME.pattern})[\w.-]*=)[^\s\"'`&;,#)\]}}]+", re.IGNORECASE)
_ENCODED_TWICE = 3


def _clean_word(match: re.Match[str]) -> str:
    word = match[0]
    cleaned = _cleaned(word)
    decoded = word
    for _ in range(_ENCODED_TWICE):
        decoded, before = unquote(decoded), decoded
        if decoded == before:
            break
        if cleaned == word and _cleaned(decoded) != decoded:
            return _cleaned(decoded)
    return cleaned


def _cleaned(word: str) -> str:
    """A word, decoded, without secrets."""
    start = _URL_START.search(word)
    while start and _LOCAL.match(word, start.start()) and word[start.end() : start.end() + 1] in ("", "/"):
        start = _URL_START.search(word, start.end() + 1)
    if start is None:
        return _NAMED.sub(r"\1***", _BARE.sub("***@", word))
    head, rest = word[: start.end()], word[start.end() :]
    first, at = rest.partition("/")[0], rest.rfind("@")
    if at >= 0 and (":" in first or "@" in first):
        rest = "***" + rest[at:]
    if addition := _ADDITION.search(rest):
        rest = rest[: addition.end()] + "***"
    return _NAMED.sub(r"\1***", head) + _NAMED.sub(r"\1***", rest)
