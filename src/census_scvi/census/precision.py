"""Precision of published values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from census_scvi.config.types import Precision

# Largest relative difference between a value and its bfloat16: half of the last of 8 bits.
BFLOAT16 = 2.0**-8


def rounded(values: npt.NDArray[np.float32], precision: Precision) -> npt.NDArray[np.float32]:
    """The values, float32; for `bfloat16` with 7 explicit bits of the mantissa, rounded half to even (IEEE 754)."""
    if precision == "float32":
        return values
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    up = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return ((bits + up) & np.uint32(0xFFFF0000)).view(np.float32)
