"""Identity of cells across releases of a Census: soma_joinids are valid within one release only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.census.open import Census
from census_scvi.errors import UserError

_DATASET, _CELL = "dataset_id", "observation_joinid"
# Statistics of a cell's counts, from which its identity follows where the Census has no id of it.
_COUNTS = ("raw_sum", "nnz", "raw_variance_nnz")
# Ids that build-census generates from the position of a cell in its file. CELLxGENE's have ten characters.
_GENERATED = r"[0-9a-f]{20}"

Keys = npt.NDArray[np.uint64]


def key_columns(census: Census) -> list[str]:
    """Columns of obs for `cell_keys`; UserError if the Census has neither ids of cells nor statistics of counts."""
    known = set(census.experiment.obs.schema.names)
    there = [name for name in (_DATASET, _CELL, *_COUNTS) if name in known]
    if _DATASET in there and (_CELL in there or known.issuperset(_COUNTS)):
        return there
    raise UserError(
        f"{census.identity['uri']}: cells cannot be recognised in another release, because obs has neither {_CELL} nor"
        f" {', '.join(_COUNTS)} (or no {_DATASET}); take a Census of schema 2.0 or newer"
    )


def cell_keys(obs: pd.DataFrame) -> Keys:
    """Hash of the identity of each cell: equal in all releases for one cell of one dataset.

    The identity is the dataset and the observation_joinid, which CELLxGENE computes from the cell's name in its dataset
    and keeps from release to release. In a local Census this id may be the position of the cell in its file, which
    changes when cells are removed. There, and without an id, the identity is the dataset and the cell's counts: their
    sum, their number and the sum of their squares.

    Parameters
    ----------
    obs
        The columns of `key_columns`.

    Returns
    -------
    uint64 (cells,). Cells with equal counts in a dataset may have equal keys: they cannot be distinguished.
    """
    datasets = obs[_DATASET].astype(object)
    if _CELL not in obs:
        return _hashes(datasets, _counted(obs))
    keys = _hashes(datasets, obs[_CELL].astype(object))
    first = np.flatnonzero(~datasets.duplicated())  # the ids of a dataset are all generated, or none is
    generated = datasets.iloc[first[obs[_CELL].iloc[first].astype(str).str.fullmatch(_GENERATED).to_numpy(bool)]]
    if len(generated) and set(_COUNTS) <= set(obs):
        rows = datasets.isin(generated).to_numpy()
        keys[rows] = _hashes(datasets[rows], _counted(obs[rows]))
    return keys


def count_keys(obs: pd.DataFrame) -> Keys | None:
    """Hash of the sum and number of each cell's counts, uint64 (cells,); None if obs lacks them.

    It differs between releases for a cell whose counts, or whose genes, were changed.
    """
    if not {"raw_sum", "nnz"} <= set(obs):
        return None
    return _hashes(obs["raw_sum"].to_numpy(np.float64), obs["nnz"].to_numpy(np.int64))


def _counted(obs: pd.DataFrame) -> npt.NDArray[np.uint64]:
    total, number, variance = (obs[name].to_numpy(np.float64) for name in _COUNTS)
    # Whole numbers: the variance is rounded differently if the genes are in another order.
    squares = np.rint(variance * np.maximum(number - 1, 0) + total**2 / np.maximum(number, 1))
    return _hashes(total, number, squares)


def _hashes(*columns: npt.ArrayLike | pd.Series) -> Keys:
    """One hash for the values of each row, the same in every process."""
    frame = pd.DataFrame({number: np.asarray(column) for number, column in enumerate(columns)})
    return pd.util.hash_pandas_object(frame, index=False, categorize=False).to_numpy(np.uint64)
