"""Machine code of a library's functions, kept from one process to the next."""

from __future__ import annotations

import sys
from contextlib import suppress

from numba.core.registry import CPUDispatcher


def keep_compiled(package: str) -> None:
    """Let numba keep what the functions of an imported package compile to, as it keeps this project's.

    UMAP leaves its own to be compiled in every process: ten seconds, whatever the number of cells. Numba keeps them
    beside the package or in the user's cache folder, and compiles anew what was changed since; where neither folder
    can be written, in every process as before.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != package:
            continue
        for function in list(vars(module).values()):
            if isinstance(function, CPUDispatcher) and function.py_func.__module__ == name:
                with suppress(RuntimeError):  # there is no folder that can be written
                    function.enable_caching()
