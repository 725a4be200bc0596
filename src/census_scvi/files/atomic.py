"""Atomic writes: a reader, or a run after kill -9, finds the old file or the new file, never a part of it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"


def write_json(path: Path, values: Any) -> None:
    """Replace a JSON file atomically; it is durable when this returns."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically; it is durable when this returns."""
    with replacing([path]) as (partial,), new_file(partial, "w") as file:
        file.write(text)


def partial_of(path: Path) -> Path:
    """Path of a file or folder while it is being written."""
    return path.with_name(path.name + PARTIAL)


@contextmanager
def replacing(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Write files under temporary names in the same folder, and rename them when all are complete.

    They are renamed in the given order, so that the last file exists only if all others do. After an error in the
    block, the temporary files are removed. A killed process may leave temporary files, which the next run replaces.

    Parameters
    ----------
    paths
        The files, all in one folder.

    Yields
    ------
    Temporary path of each file; a file that was not written there is skipped.
    """
    partials = [partial_of(path) for path in paths]
    for partial in partials:
        remove(partial)
    try:
        yield partials
        written = [(partial, path) for partial, path in zip(partials, paths, strict=True) if partial.exists()]
        for partial, _ in written:
            sync(partial)
        for partial, path in written:
            partial.replace(path)
        sync(paths[-1].parent)
    finally:
        for partial in partials:
            remove(partial)


def new_file(path: Path, mode: str) -> IO[Any]:
    """Create a file and open it in mode "w" (UTF-8) or "wb"; an old file is removed, a link is not followed."""
    remove(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    return os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8")


def sync(path: Path) -> None:
    """Make the contents of a file, or the names in a folder, durable (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a folder, and all files and folders in it, durable (fsync)."""
    for path in [folder, *folder.rglob("*")]:
        sync(path)


# Arguments of renameat2 of Linux: paths are relative to the current folder; the two paths are exchanged.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def exchange(one: Path, other: Path) -> bool:
    """Exchange two files or folders atomically; False if the exchange failed or is not supported here."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
