"""Columns with several values in a cell, as the Census has them in `disease` ("influenza || pneumonia")."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from census_scvi.annotation.labelled.joined import Joined
from census_scvi.annotation.protocol import Cells
from census_scvi.annotation.validation.folds import BY_CELLS

SEPARATOR = " || "


def split_labels(joined: Joined) -> Joined:
    """Reference and query, in which a reference cell with several values is there once for each of them.

    All copies of a cell are held out together.
    """
    rows, labels = np.arange(joined.cells.n_reference), dict(joined.labels)
    for column, values in joined.labels.items():
        parts = [[None] if value is None else _values(value) for value in values[rows]]
        numbers = [len(each) for each in parts]
        labels = {name: np.repeat(each, numbers) for name, each in labels.items()}
        labels[column] = np.array([value for each in parts for value in each], dtype=object)
        rows = np.repeat(rows, numbers)
    if len(rows) == joined.cells.n_reference:
        return joined
    units = {name: values[rows] for name, values in joined.units.items()} or {BY_CELLS: rows.astype(object)}
    return replace(joined, cells=_repeated(joined, rows), labels=labels, units=units)


def _values(label: str) -> list[str]:
    return list(dict.fromkeys(value.strip() for value in label.split(SEPARATOR) if value.strip()))


def _repeated(joined: Joined, rows: npt.NDArray[np.int64]) -> Cells:
    cells = joined.cells
    every = np.append(rows, cells.query)
    return replace(
        cells,
        counts=sp.csr_matrix(cells.counts[every]),
        batch=cells.batch[every],
        n_reference=len(rows),
        embedding=None if cells.embedding is None else cells.embedding[every],
    )
