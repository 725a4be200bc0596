"""Identity of a file: its size and the SHA-256 of its blocks."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from census_scvi.files.json_file import read_json
from census_scvi.files.paths import expand_argument

# Blocks are hashed in parallel (hashlib releases the GIL). With 256 MiB per block, the list of digests stays short for
# files of a terabyte. The digest of a file of one block equals the output of `sha256sum`.
BLOCK_BYTES = 256 * 2**20
_READ_BYTES = 2**20
_THREADS = 4

# Checked files of at least this size are remembered by size and times, and not hashed again; maximum number of them.
REMEMBERED_BYTES, _REMEMBERED_FILES = 64 * 2**20, 1000
# Younger files are not remembered: another write within the same clock tick would leave their times unchanged.
_SETTLED_SECONDS = 2.0
_MEMORY = "checked-files.json"

Identity = dict[str, Any]


def file_identity(path: Path) -> Identity:
    """`{"size": bytes, "sha256": [hex digest of each 256 MiB block]}`."""
    size = path.stat().st_size
    offsets = range(0, max(size, 1), BLOCK_BYTES)
    with ThreadPoolExecutor(_THREADS) as pool:
        return {"size": size, "sha256": list(pool.map(lambda offset: _block_digest(path, offset), offsets))}


def _block_digest(path: Path, offset: int) -> str:
    digest = hashlib.sha256()
    left = BLOCK_BYTES
    with path.open("rb") as file:
        file.seek(offset)
        while left and (data := file.read(min(_READ_BYTES, left))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def identities(root: Path, names: Iterable[str]) -> dict[str, Identity]:
    """Identity of each file, recursing into folders, by path relative to `root`: `{"scvi.model/model.pt": {...}}`."""
    found: dict[str, Identity] = {}
    for name in names:
        path = root / name
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        found |= {file.relative_to(root).as_posix(): file_identity(file) for file in files}
    return found


def damage(path: Path, expected: Identity, *, contents: bool = True, remember: bool = False) -> str | None:
    """Describe how a file differs from its record; None if it does not.

    Parameters
    ----------
    path
        The file.
    expected
        Its recorded identity.
    contents
        Whether to hash the file; otherwise only its presence and size are checked.
    remember
        Whether to skip hashing of a large file that passed an earlier check and has the same size and times since.
    """
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != expected["size"]:
        return f"has {size:,} bytes, expected {expected['size']:,}"
    if not contents:
        return None
    remember = remember and size >= REMEMBERED_BYTES
    if remember and _remembered().get(str(path.resolve())) == _state(path, expected):
        return None
    before = _state(path, expected)
    if file_identity(path)["sha256"] != expected["sha256"]:
        return "has changed since it was written"
    if remember and time.time() - path.stat().st_mtime > _SETTLED_SECONDS:
        _keep(str(path.resolve()), before)
    return None


def cache_folder() -> Path:
    """Folder of cached files: `CENSUS_SCVI_CACHE`, or `census-scvi` in the user's cache folder."""
    if given := os.environ.get("CENSUS_SCVI_CACHE"):
        return Path(expand_argument(given, "CENSUS_SCVI_CACHE"))
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "census-scvi"


def _state(path: Path, expected: Identity) -> list[Any]:
    """Size, times and inode of a file, which change when it is written, and a digest of its recorded identity."""
    found = path.stat()
    digest = hashlib.sha256(json.dumps(expected["sha256"]).encode()).hexdigest()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev, digest]


def _remembered() -> dict[str, list[Any]]:
    try:
        return dict(read_json(cache_folder() / _MEMORY))
    except (OSError, ValueError, TypeError, RuntimeError):  # RuntimeError: no home folder
        return {}


def _keep(path: str, state: list[Any]) -> None:
    """Remember a checked file; if the cache is not writable, the file is hashed again next time."""
    files = {name: known for name, known in _remembered().items() if name != path} | {path: state}
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        partial = cache_folder() / f"{_MEMORY}.{os.getpid()}"
        partial.write_text(json.dumps(dict(list(files.items())[-_REMEMBERED_FILES:])), encoding="utf-8")
        partial.replace(cache_folder() / _MEMORY)
    except (OSError, RuntimeError):
        return
