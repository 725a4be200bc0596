"""Progress bars on a terminal and in a notebook, and messages in a notebook."""

from __future__ import annotations

import logging
import sys
from typing import Any

from tqdm import tqdm

_NOTEBOOK_DELAY = 2.0


def progress_bar(total: int, what: str, *, done: int = 0, shown: bool = True, unit: str = "cells") -> tqdm[Any]:
    """Progress bar on stderr, of cells or another unit; disabled in a log file, or if not `shown`."""
    notebook = in_notebook()
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=f" {unit}",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not (shown and (notebook or sys.stderr.isatty())),
        delay=_NOTEBOOK_DELAY if notebook else 0,
    )


def show_messages() -> None:
    """In a notebook, show the messages of this project below the cell, unless logging is already configured."""
    project = logging.getLogger("census_scvi")
    if in_notebook() and not project.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        project.addHandler(handler)
        project.setLevel(logging.INFO)


def in_notebook() -> bool:
    """Whether the code runs in a Jupyter kernel."""
    return "ipykernel" in sys.modules
