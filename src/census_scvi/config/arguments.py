"""Check arguments of public functions; a wrong value causes a one-line error."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from census_scvi.errors import UserError


def require_whole(name: str, value: Any, least: int) -> None:
    """UserError unless the value is a whole number and at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} is {value!r}; expected a whole number of {least} or more")


def require_number(name: str, value: Any, *, above: float | None = None, most: float | None = None) -> None:
    """UserError unless the value is finite, larger than `above` (None: at least 0), and at most `most` (None: any)."""
    fine = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if fine and (value > above if above is not None else value >= 0) and (most is None or value <= most):
        return
    expected = f"above {above:g}" if above is not None else "of 0 or more"
    limit = "" if most is None else f" and at most {most:g}"
    raise UserError(f"{name} is {value!r}; expected a number {expected}{limit}")
