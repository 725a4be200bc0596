"""A picture that a notebook shows."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

_DPI = 90


class Picture(Figure):
    """A matplotlib Figure that shows itself at the end of a notebook's cell, whatever pyplot is set up for."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=_DPI)
        return buffer.getvalue()
