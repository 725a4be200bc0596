"""The technical batches of a user's cells: combinations of values of obs columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.census.cells import batch_label
from census_scvi.config.messages import suggestion
from census_scvi.errors import UserError


def batches_of(obs: pd.DataFrame, columns: list[str]) -> npt.NDArray[np.object_]:
    """The combination of values of some columns, object (cells,); without columns all cells are one batch."""
    if not columns:
        return np.full(len(obs), "", dtype=object)
    values = obs[columns].astype(object).itertuples(index=False, name=None)
    return np.array([batch_label(each) for each in values], dtype=object)


def required_batches(obs: pd.DataFrame, columns: Sequence[str], setting: str) -> npt.NDArray[np.object_]:
    """Batch of each cell, object (cells,).

    Parameters
    ----------
    obs
        The cells.
    columns
        obs columns whose combinations are the batches.
    setting
        Name of the setting or argument that names them, for messages.

    Raises
    ------
    UserError
        No column is named, a column does not exist, or it has no value for a cell.
    """
    if not columns:
        raise UserError(f"{setting} names no obs column; give the column (or columns) of the samples or donors")
    for column in columns:
        if column not in obs:
            near = suggestion(column, list(map(str, obs.columns)))
            have = ", ".join(map(str, obs.columns[:10])) or (
                "no column, as 10x files: write the cells as .h5ad with a column of their sample"
            )
            raise UserError(f"{setting}: the cells have no obs column {column!r}{near or f'; obs has {have}'}")
        if missing := int(obs[column].isna().sum()):
            raise UserError(
                f"{setting}: obs[{column!r}] has no value for {missing:,} of {len(obs):,} cells; each needs one"
            )
    return batches_of(obs, list(columns))
