"""Columns that divide the cells in the same way, so that no table and no map is repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd


def same_groups(columns: Mapping[str, npt.ArrayLike | pd.Series]) -> dict[str, str]:
    """Columns that divide the cells as an earlier one does, under whatever names: each with the first of these.

    Parameters
    ----------
    columns
        (cells,) by name; missing values are a separate group.
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
    """Groups numbered in the order of their first cells: equal for columns with the same groups of cells."""
    codes, _ = pd.factorize(pd.Series(values, dtype=object).to_numpy(), use_na_sentinel=False)
    return np.asarray(codes, np.int64)
