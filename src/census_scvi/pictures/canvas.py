"""A figure that a notebook displays."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

_DPI = 90


class Picture(Figure):
    """A matplotlib Figure that a notebook displays at the end of a cell, with any pyplot backend."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=_DPI)
        return buffer.getvalue()
