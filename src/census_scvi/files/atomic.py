"""Writing so that a reader, or a run after kill -9, finds the old file or the new one, never half of it."""

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
    """Replace a JSON file in one step, durable when this returns."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step, durable when this returns."""
    with replacing([path]) as (partial,), new_file(partial, "w") as file:
        file.write(text)


def partial_of(path: Path) -> Path:
    """Path of a file before it is complete."""
    return path.with_name(path.name + PARTIAL)


@contextmanager
def replacing(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Write files next to their final places, and rename them when all are complete.

    They are renamed in their order, so that the last one is there only if all are. Whatever ends the block otherwise,
    nothing of it is left. A kill may leave partial files, which the next run replaces.

    Parameters
    ----------
    paths
        The files, of one folder.

    Yields
    ------
    Where to write each; one that is not written is passed over.
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
    """Open a file that is made here, for "w" (UTF-8) or "wb"; removes an old one, follows no link."""
    remove(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    return os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8")


def sync(path: Path) -> None:
    """Make the renames in a folder, or the contents of a file, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make the contents of every file below a folder durable."""
    for path in [folder, *folder.rglob("*")]:
        sync(path)


# Linux' renameat2: paths are relative to the current folder; the two names exchange their contents.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def exchange(one: Path, other: Path) -> bool:
    """Let two files or folders change places in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def remove(path: Path) -> None:
    """Delete a file or a folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
