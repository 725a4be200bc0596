"""Zarr stores, as anndata writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zarr

from census_scvi.errors import UserError

_METADATA = (".zgroup", ".zarray", ".zattrs", ".zmetadata", "zarr.json")
# Codecs that run code of the store.
_UNSAFE = {"pickle", "numcodecs.pickle"}
# Arrays of at most this number of bytes are read without a comparison of declared and stored size.
_HARMLESS = 2**26


def open_zarr(path: Path) -> zarr.Group:
    """Open a store for reading.

    Raises
    ------
    UserError
        It is damaged or not a store of anndata, uses a codec that can run code, or declares absurd sizes.
    """
    _refuse_unsafe_codecs(path)
    try:
        store = zarr.open_group(str(path), mode="r")
        names = set(store)
        for name, array in store.arrays():
            _check_size(path, name, array)
        for name, array in _arrays_below(store):
            _check_size(path, name, array)
    except UserError:
        raise
    except Exception as error:  # zarr raises many kinds of errors
        raise UserError(f"{path}: the zarr store cannot be read ({_line(error)})") from error
    if not {"obs", "var"} <= names:
        found = ", ".join(sorted(names)) or "nothing"
        raise UserError(f"{path}: the zarr store has no obs and var (it has {found}); expected one that anndata wrote")
    return store


def _arrays_below(group: zarr.Group, prefix: str = "") -> Iterator[tuple[str, zarr.Array]]:
    for name, child in group.groups():
        for each, array in child.arrays():
            yield f"{prefix}{name}/{each}", array
        yield from _arrays_below(child, f"{prefix}{name}/")


def _check_size(path: Path, name: str, array: zarr.Array) -> None:
    size = math.prod(array.shape) * array.dtype.itemsize
    if size <= _HARMLESS:
        return
    n_chunks = sum(file.is_file() and file.name not in _METADATA for file in (path / name).rglob("*"))
    stored = n_chunks * math.prod(array.shards or array.chunks) * array.dtype.itemsize
    if 2 * stored < size:
        raise UserError(
            f"{path}: {name} declares {array.shape} of {array.dtype}, but the store contains {stored / size:.0%} of it:"
            " it is damaged, or built to fill the memory"
        )


def _refuse_unsafe_codecs(path: Path) -> None:
    for name in _METADATA:
        for file in path.rglob(name):
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"{file}: damaged metadata of a zarr store ({_line(error)})") from error
            if found := _UNSAFE & set(_codecs(content)):
                raise UserError(f"{file}: uses the codec {found.pop()}, which can run code and is not read")


def _codecs(content: Any) -> Iterator[str]:
    """Names of all codecs in the metadata, at any depth."""
    if isinstance(content, dict):
        yield from (str(content[key]) for key in ("id", "name") if key in content)
        for value in content.values():
            yield from _codecs(value)
    elif isinstance(content, list):
        for value in content:
            yield from _codecs(value)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
