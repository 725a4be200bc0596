"""TileDB-Py, which tiledb-vector-search needs and many installations have, in one process with tiledbsoma."""

from __future__ import annotations

import importlib
from typing import Any


def tiledb_py() -> Any:
    """The package `tiledb`, which must be installed.

    tiledbsoma imports it where it is installed. From then on, errors of TileDB's core are its TileDBError, in
    tiledbsoma, too. tiledbsoma and this project expect RuntimeError there, so TileDBError is made one.
    """
    tiledb = importlib.import_module("tiledb")
    if not issubclass(tiledb.TileDBError, RuntimeError):
        tiledb.TileDBError.__bases__ = (RuntimeError,)
    return tiledb
