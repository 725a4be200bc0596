"""Rows of an obs table in memory that match a value filter, as TileDB-SOMA would find them in a Census."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.config.obs_filter import Condition, FilterError, Group, parse_filter

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": lambda column, value: column.isna() if value is None else column == value,
    "!=": lambda column, value: column.notna() if value is None else column.notna() & (column != value),
    "<": lambda column, value: column < value,
    "<=": lambda column, value: column <= value,
    ">": lambda column, value: column > value,
    ">=": lambda column, value: column >= value,
    "in": lambda column, value: column.isin(value),
    "not in": lambda column, value: column.notna() & ~column.isin(value),
}


def matching_rows(text: str, column_of: Callable[[str], pd.Series], setting: str, place: str) -> npt.NDArray[np.bool_]:
    """Bool (cells,): cells that match a value filter.

    Parameters
    ----------
    text
        The value filter.
    column_of
        Function that returns a column by its name, or raises a UserError.
    setting, place
        The setting that contains the filter, and the file with the cells, for errors.

    Raises
    ------
    FilterError
        The filter cannot be used on these columns, or matches no cell.
    """

    def matches(condition: Condition) -> npt.NDArray[np.bool_]:
        if isinstance(condition, Group):
            parts = [matches(part) for part in condition.parts]
            return np.logical_and.reduce(parts) if condition.word == "and" else np.logical_or.reduce(parts)
        column = column_of(condition.column)
        try:
            return np.asarray(_COMPARE[condition.operator](column, condition.value), dtype=bool)
        except TypeError as error:
            raise FilterError(f"{setting} {text!r} cannot be used on obs[{condition.column!r}]: {error}") from None

    try:
        found = matches(parse_filter(text))
    except ValueError as error:
        raise FilterError(f"{setting} {text!r} cannot be used on obs: {error}") from None
    if not found.any():
        raise FilterError(f"{setting} {text!r} matches no cell of {place}; change it")
    return found
