"""Convert results to values that JSON supports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def json_values(values: Any) -> Any:
    """Convert tuples and arrays to lists, numpy scalars to Python values, and NaN and infinity to None."""
    if isinstance(values, Mapping):
        return {str(name): json_values(value) for name, value in values.items()}
    if isinstance(values, list | tuple | np.ndarray):
        return [json_values(value) for value in values]
    if isinstance(values, np.generic):
        return json_values(values.item())
    return None if isinstance(values, float) and not math.isfinite(values) else values
