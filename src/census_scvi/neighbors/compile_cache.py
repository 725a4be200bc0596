"""Cache on disk for the functions that numba compiles for a library, shared by processes."""

from __future__ import annotations

import sys
from contextlib import suppress

from numba.core.registry import CPUDispatcher


def keep_compiled(package: str) -> None:
    """Let numba cache the compiled functions of an imported package on disk, as for this project's functions.

    UMAP does not use this cache, so each process would compile for ten seconds for any number of cells. numba writes
    next to the package or into the user's cache folder, and compiles a function again when its file changes.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != package:
            continue
        for function in list(vars(module).values()):
            if isinstance(function, CPUDispatcher) and function.py_func.__module__ == name:
                with suppress(RuntimeError):  # neither folder is writable: each process compiles, as without this cache
                    function.enable_caching()
