"""Progress bars: on a terminal, and in a notebook once something takes longer than a moment."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_NOTEBOOK_DELAY = 2.0


def progress_bar(total: int, what: str, *, done: int = 0, shown: bool = True) -> tqdm[Any]:
    """A bar for `total` cells on stderr; none where nobody looks, such as in a log file, or if not `shown`."""
    notebook = "ipykernel" in sys.modules
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=" cells",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not (shown and (notebook or sys.stderr.isatty())),
        delay=_NOTEBOOK_DELAY if notebook else 0,
    )
