"""An annotation as columns of obs, and under the names that scNym gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.annotation.ontology import Hierarchy, term_columns
from census_scvi.annotation.protocol import UNKNOWN, Annotation
from census_scvi.annotation.results.groups import group_columns

Rows = npt.NDArray[np.int64]


def annotation_columns(
    annotation: Annotation,
    labels: str,
    rows: Rows,
    n_cells: int,
    hierarchy: Hierarchy | None = None,
    *,
    empty: npt.NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """Columns for obs.

    `<labels>_predicted` (a cell that is not known is "unknown"), `_best`, `_probability`, `_uncertainty`, `_unknown`,
    the label of each member of the method and of each one it is compared with, `<labels>_<method>`; of a method with
    several members `_agreement`, the share of them that give the best label; `_group`, `_group_label` and
    `_group_share` (`group_columns`); and the columns of the Cell Ontology (`term_columns`).

    Parameters
    ----------
    annotation
        Annotation of some cells.
    labels
        Name of the column of the reference.
    rows
        int64 (annotated cells,): their rows in obs; the others have missing values.
    n_cells
        Number of rows of obs.
    hierarchy
        Terms of the labels; None: no terms.
    empty
        bool (annotated cells,): cells without counts. They are unknown, whatever the method says: no label, probability
        0, uncertainty 1. None: there are none.
    """
    empty = np.zeros(len(rows), bool) if empty is None else empty
    unknown, best = annotation.unknown | empty, annotation.labels
    named = {name: labels_of(annotation, values) for name, values in (annotation.compared | annotation.members).items()}
    found: dict[str, Any] = {
        "predicted": np.where(unknown, UNKNOWN, best),
        "best": np.where(empty, UNKNOWN, best),
        "probability": np.where(empty, np.float32(0), annotation.probability.max(axis=1)),
        "uncertainty": np.where(empty, np.float32(1), annotation.uncertainty),
        "unknown": unknown,
    }
    several = len(annotation.members) > 1  # the label of a single member is `_best`
    shown = named if several else {name: named[name] for name in annotation.compared}
    found |= {name: np.where(empty, UNKNOWN, each) for name, each in shown.items()}
    if several:
        found["agreement"] = np.where(empty, 0, np.mean([named[name] == best for name in annotation.members], axis=0))
    columns = {f"{labels}_{name}": _spread(values, rows, n_cells) for name, values in found.items()}
    groups = group_columns(labels, annotation.groups, best, unknown)
    columns |= {name: _spread(np.asarray(values), rows, n_cells) for name, values in groups.items()}
    if hierarchy is not None:
        terms = term_columns(hierarchy, labels, annotation.probability, unknown, annotation.name_threshold)
        columns |= {name: _spread(np.asarray(values), rows, n_cells) for name, values in terms.items()}
    return columns


def labels_of(annotation: Annotation, probability: npt.NDArray[np.float32]) -> npt.NDArray[np.object_]:
    """Most probable label of each cell, object (cells,), by probabilities (cells, classes) of one of the methods."""
    return np.array(annotation.classes, dtype=object)[probability.argmax(axis=1)]


def scnym_columns(
    labels: npt.NDArray[np.object_], probability: npt.NDArray[np.float32], key: str, rows: Rows, n_cells: int
) -> dict[str, Any]:
    """Columns for obs under scNym's names: `key` and `key + "_confidence"`; parameters as in `annotation_columns`."""
    return {
        key: _spread(labels, rows, n_cells),
        f"{key}_confidence": _spread(probability.max(axis=1), rows, n_cells),
    }


def probability_table(
    classes: list[str], probability: npt.NDArray[np.float32], rows: Rows, names: pd.Index
) -> pd.DataFrame:
    """Probabilities of the annotated cells, indexed by the names of the cells; one column per class."""
    return pd.DataFrame(probability, index=names[rows].astype(str), columns=classes)


def spread_values(values: npt.NDArray[np.floating], rows: Rows, n_cells: int) -> npt.NDArray[np.float32]:
    """Values of the annotated cells in all rows, float32 (cells, dimensions); NaN in the others."""
    spread = np.full((n_cells, values.shape[1]), np.nan, np.float32)
    spread[rows] = values
    return spread


def _spread(values: npt.NDArray[Any], rows: Rows, n_cells: int) -> Any:
    """Values of the annotated cells in all rows: text as a Categorical, numbers with NaN, bool with False elsewhere."""
    if values.dtype == bool:
        whole = np.zeros(n_cells, bool)
        whole[rows] = values
        return whole
    if values.dtype.kind in "fiu":
        return spread_values(values[:, None], rows, n_cells)[:, 0]
    text = np.full(n_cells, None, dtype=object)
    text[rows] = values
    return pd.Categorical(text)
