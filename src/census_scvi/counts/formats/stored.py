"""What a reader of a file format returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from census_scvi.counts.raw_counts import Matrix


@dataclass(frozen=True)
class StoredCells:
    """Cells of an open file; the matrices are read when they are needed.

    Attributes
    ----------
    obs
        One row per cell.
    matrices
        Matrices, cells x genes, by place: `X`, `raw`, `layers/<name>`.
    var
        One row per gene of `X` and the layers.
    raw_var
        One row per gene of `raw`.
    store
        The open .h5ad or zarr store, for the parts that only these have (obsm, uns); None for another format.
    """

    obs: pd.DataFrame
    matrices: Mapping[str, Matrix]
    var: pd.DataFrame
    raw_var: pd.DataFrame
    store: Any = None

    @classmethod
    def of(cls, obs: pd.DataFrame, matrices: Mapping[str, Matrix], var: pd.DataFrame) -> StoredCells:
        """Cells of a format without `raw`."""
        return cls(obs, matrices, var, var)
