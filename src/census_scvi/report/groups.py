"""Columns that group the cells identically, so that the report shows each grouping once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd


def same_groups(columns: Mapping[str, npt.ArrayLike | pd.Series]) -> dict[str, str]:
    """Map each column that groups the cells like an earlier one to the first such column; labels may differ.

    Parameters
    ----------
    columns
        Values (cells,) by column name; missing values are a separate group.
    """
    found: dict[str, str] = {}
    first: dict[str, npt.NDArray[np.int64]] = {}
    for name, values in columns.items():
        codes = _codes(values)
        twin = next((other for other, before in first.items() if np.array_equal(before, codes)), None)
        if twin is None:
            first[name] = codes
        else:
            found[name] = twin
    return found


def _codes(values: Any) -> npt.NDArray[np.int64]:
    """Group numbers in order of first occurrence: equal for columns that group the cells identically."""
    codes, _ = pd.factorize(pd.Series(values, dtype=object).to_numpy(), use_na_sentinel=False)
    return np.asarray(codes, np.int64)
