"""Raw counts of some of the cells that a model was trained on, from its published folder or its run directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from census_scvi.counts.h5ad import CountMatrix, open_file, read_frame
from census_scvi.counts.raw_counts import sample_spans
from census_scvi.errors import UserError
from census_scvi.model.published import SEALED, fetch
from census_scvi.model.source import Source
from census_scvi.workspace import Workspace


def typical_counts(uri: str, genes: list[str]) -> sp.csr_matrix | None:
    """Raw counts of cells from the sealed sample or from the prepared cells; None if neither is available.

    Parameters
    ----------
    uri
        Published folder, its URL, or run directory from which the model was read.
    genes
        feature_ids of the model.

    Returns
    -------
    CSR float32 (cells, genes), genes in the model's order.
    """
    try:
        file = _file(uri)
        return None if file is None else _read(file, genes)
    except (UserError, OSError, KeyError):  # the counts are optional
        return None


def _file(uri: str) -> Path | None:
    source = Source.at(uri)
    if (run := source.run) is not None:
        prepared = (Workspace(run).record("prepare") or {}).get("artifacts", [])
        return next((run / name for name in prepared if str(name).endswith(".h5ad")), None)
    return fetch(uri) / SEALED if source.is_published else None


def _read(path: Path, genes: list[str]) -> sp.csr_matrix | None:
    with open_file(path) as file:
        matrix, names = CountMatrix(file, "X"), read_frame(file, "var").index.astype(str)
        rows = sp.vstack([part for _, part in matrix.sample(sample_spans(matrix.shape[0]))], format="csr")
    columns = pd.Index(names).get_indexer(genes)
    return None if (columns < 0).any() else sp.csr_matrix(rows[:, columns], dtype=np.float32)
