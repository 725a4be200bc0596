"""What makes a file the same file: its size and the SHA-256 of its blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Blocks are hashed side by side (hashlib releases the GIL) and name the place of a damage; 256 MiB keeps the list
# short for files of a terabyte. A file of one block has the digest that `sha256sum` prints.
BLOCK_BYTES = 256 * 2**20
_READ_BYTES = 2**20
_THREADS = 4

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
    """Identity of each file, folders walked: `{"scvi.model/model.pt": {...}}`, keyed relative to `root`."""
    found: dict[str, Identity] = {}
    for name in names:
        path = root / name
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        found |= {file.relative_to(root).as_posix(): file_identity(file) for file in files}
    return found


def damage(path: Path, expected: Identity, *, contents: bool = True) -> str | None:
    """What is wrong with a file, in words, or None where it is what was recorded.

    Parameters
    ----------
    path
        The file.
    expected
        Its recorded identity.
    contents
        Whether to hash it, or to look at presence and size only.
    """
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != expected["size"]:
        return f"has {size:,} bytes where {expected['size']:,} were written"
    if contents and file_identity(path)["sha256"] != expected["sha256"]:
        return "has other contents than were written"
    return None
