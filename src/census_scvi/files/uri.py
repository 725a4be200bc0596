"""Local and remote locations: paths and URLs for TileDB and fsspec, and removal of credentials.

A place is a path or a URL. TileDB and fsspec do not decode the path of a file URL: %20 is three characters. The URL of
`Path.as_uri()` is therefore another folder for them.
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
# Characters at which tiledbsoma cuts the path of a group when it creates a member: urllib.parse takes the rest as a
# query, fragment or parameters, or removes the character.
_CUT_BY_SOMA = re.compile(r"[?#;\t\r\n]")


def local_path(place: str) -> Path | None:
    """The path of a local location; None for a remote URL.

    The path of a file URL is not decoded, as in TileDB and fsspec, unless only the decoded path exists.
    """
    if url := _FILE_URL.match(place):
        written = place[url.end() :]
        decoded = unquote(written)
        return Path(decoded if os.path.lexists(decoded) and not os.path.lexists(written) else written)
    return None if _URL.match(place) else Path(place)


def absolute(place: str) -> str:
    """The location independent of the current folder: paths become absolute, remote URLs stay unchanged."""
    path = local_path(place)
    if path is None:
        return place
    return f"file://{path}" if _FILE_URL.match(place) else str(path.absolute())


def tiledb_place(place: str, what: str) -> str:
    """Like `absolute`; UserError if TileDB cannot open a folder with this name; `what` is the name of the setting."""
    path = local_path(place)
    if path is not None:
        if path.name.endswith(":"):
            raise UserError(f"{what} {place}: TileDB cannot open a folder whose name ends with ':'; rename it")
        if "\0" in place or place != place.encode(errors="replace").decode():
            raise UserError(f"{what} {place!a}: TileDB opens only folders whose names are UTF-8; rename the folder")
    return absolute(place)


def file_system(place: str, **options: Any) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of a location, and the path in it. Unlike fsspec, it does not split local paths at `::`.

    `options` are those of the file system of a URL, for example `key` and `secret`. ValueError if the URL is not valid.
    """
    import fsspec

    if (path := local_path(place)) is not None:
        return fsspec.filesystem("file"), str(path.absolute())
    try:
        return fsspec.url_to_fs(place, **options)
    except ValueError:
        if without_credentials(place) == place:
            raise
        # The message of fsspec may contain a part of the password.
        raise ValueError("it is not a valid URL; in a password write / as %2F and @ as %40, or omit it") from None


@contextmanager
def plain_name(folder: Path) -> Iterator[Path]:
    """A folder, or a temporary link to it if tiledbsoma would cut its path when it creates members of a group."""
    if not _CUT_BY_SOMA.search(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        link = Path(scratch) / "folder"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def leaves_folder(name: str) -> bool:
    """Whether a name is absolute or contains `..`, so that it may point outside its folder."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def without_credentials(values: Any) -> Any:
    """Remove credentials: user, password and query of every URL, and values whose names mean secrets.

    If the end of a secret is unclear, too much is removed rather than too little: only `f` remains of
    `://a:b/c@d/e@f`. Local paths, mail addresses and URLs without credentials stay unchanged.

    Parameters
    ----------
    values
        A string, or lists and mappings of any depth that contain strings; all other values stay unchanged.
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
# A URL starts with a scheme and one slash (as pathlib writes it) or two, or with two slashes at the beginning of a word
# or value. `a//b` is a path.
_URL_START = re.compile(r"(?<![\w+.-])[A-Za-z][\w+.-]*:/{1,2}(?!/)|(?<![^\s\"'`(\[{<=,;|])//(?!/)")
_LOCAL = re.compile(r"file:/(?:/localhost)?(?:/(?=/))?", re.IGNORECASE)
# user:password@host without slashes, but not mailto:name@host.
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
    """Remove secrets from a word."""
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
