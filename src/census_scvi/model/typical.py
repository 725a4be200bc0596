"""Raw counts of some of the cells that a model was trained on, from its published folder or its run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem

from census_scvi.config.run_names import PROTEINS
from census_scvi.counts.h5ad import CountMatrix, open_file, read_frame
from census_scvi.counts.raw_counts import sample_spans
from census_scvi.errors import UserError
from census_scvi.model.published import SEALED, fetch
from census_scvi.model.source import Source
from census_scvi.workspace import Workspace


@dataclass(frozen=True)
class TypicalCells:
    """Some of the cells of a model.

    Attributes
    ----------
    counts
        CSR float32 (cells, genes): raw counts, genes in the model's order.
    batches
        object (cells,): batch labels; those of a sealed sample may be batches that the model was not trained on.
    proteins
        float32 (cells, proteins): raw counts of the model's proteins; None if they are not in the file.
    """

    counts: sp.csr_matrix
    batches: npt.NDArray[np.object_]
    proteins: npt.NDArray[np.float32] | None = None


def typical_cells(uri: str, genes: list[str]) -> TypicalCells | None:
    """Cells from the sealed sample or from the prepared cells; None if neither is available.

    Parameters
    ----------
    uri
        Published folder, its URL, or run directory from which the model was read.
    genes
        feature_ids of the model.
    """
    try:
        file = _file(uri)
        return None if file is None else _read(file, genes)
    except (UserError, OSError, KeyError):  # the cells are optional
        return None


def typical_counts(uri: str, genes: list[str]) -> sp.csr_matrix | None:
    """Raw counts of `typical_cells`; None if they are not available."""
    cells = typical_cells(uri, genes)
    return None if cells is None else cells.counts


def _file(uri: str) -> Path | None:
    source = Source.at(uri)
    if (run := source.run) is not None:
        prepared = (Workspace(run).record("prepare") or {}).get("artifacts", [])
        return next((run / name for name in prepared if str(name).endswith(".h5ad")), None)
    return fetch(uri) / SEALED if source.is_published else None


def _read(path: Path, genes: list[str]) -> TypicalCells | None:
    with open_file(path) as file:
        matrix, names = CountMatrix(file, "X"), read_frame(file, "var").index.astype(str)
        spans = sample_spans(matrix.shape[0])
        rows = sp.vstack([part for _, part in matrix.sample(spans)], format="csr")
        batches, proteins = _batches(file["obs/batch"], spans), None
        if (place := f"obsm/{PROTEINS}") in file and isinstance(file[place], h5py.Dataset):
            proteins = np.concatenate([file[place][start:stop] for start, stop in spans]).astype(np.float32)
    columns = pd.Index(names).get_indexer(genes)
    if (columns < 0).any():
        return None
    counts = sp.csr_matrix(rows[:, columns], dtype=np.float32)
    return TypicalCells(counts, batches, proteins)


def _batches(column: h5py.Group | h5py.Dataset, spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.object_]:
    """Labels of some ranges of cells; only these are read, because the prepared file may have millions of cells."""
    if isinstance(column, h5py.Dataset):
        return np.concatenate([column.asstr()[start:stop] for start, stop in spans]).astype(object)
    codes = np.concatenate([column["codes"][start:stop] for start, stop in spans])
    categories: npt.NDArray[np.object_] = np.asarray(read_elem(column["categories"]), dtype=object)
    return categories[codes]
