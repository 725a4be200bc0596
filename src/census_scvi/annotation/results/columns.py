"""Annotations as columns of obs, and under the names that scNym gives; their quality for uns."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.annotation.methods import TITLES
from census_scvi.annotation.ontology import Hierarchy, term_columns
from census_scvi.annotation.protocol import UNKNOWN, Annotated, Annotation
from census_scvi.annotation.results.groups import group_columns

log = logging.getLogger(__name__)

# Entry of uns with the quality of labels of an atlas, and column of obs of the cells without counts.
PREDICTION, EMPTY = "scvi_prediction", "scvi_empty"
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Results:
    """What annotations add to an AnnData: columns of obs, entries of obsm and of uns."""

    obs: dict[str, Any] = field(default_factory=dict)
    obsm: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    uns: dict[str, Any] = field(default_factory=dict)


def results_of(
    annotated: Sequence[Annotated],
    rows: Rows,
    names: pd.Index,
    *,
    quality: str | None = None,
    more: Mapping[str, Any] | None = None,
    key_added: str | None = None,
    empty: npt.NDArray[np.bool_] | None = None,
) -> Results:
    """Results of annotations for all rows of obs.

    Parameters
    ----------
    annotated
        Annotations of the same cells with one or several columns of labels.
    rows
        int64 (annotated cells,): their rows in obs; the others have missing values.
    names
        Names of all cells.
    quality
        Entry of uns for the quality of each annotation, by column; None: it is not written.
    more
        What this entry tells in addition.
    key_added
        Adds scNym's names: `obs[key]`, `obs[key + "_confidence"]`, `uns[key + "_probabilities"]` and
        `obsm["X_" + key.lower()]`; of several columns `key + "_" + column` instead of the key. None: not added.
    empty
        As in `annotation_columns`.
    """
    found, n_cells = Results(), len(names)
    for each in annotated:
        annotation = each.annotation
        columns = annotation_columns(annotation, each.labels, rows, n_cells, each.hierarchy, empty=empty)
        found.obs.update(columns)
        if quality is not None:
            certain = ~columns[f"{each.labels}_unknown"][rows]
            found.uns.setdefault(quality, {})[each.labels] = _quality(each, certain) | dict(more or {})
        if key_added is not None:
            key = key_added if len(annotated) == 1 else f"{key_added}_{each.labels}"
            found.obs.update(scnym_columns(annotation.labels, annotation.probability, key, rows, n_cells))
            found.uns[f"{key}_probabilities"] = probability_table(
                annotation.classes, annotation.probability, rows, names
            )
            found.obsm[f"X_{key.lower()}"] = spread_values(annotation.embedding, rows, n_cells)
    return found


def add_results(cells: ad.AnnData, results: Results) -> None:
    """Write results into an AnnData; entries of uns that are mappings keep what they already have."""
    for name, values in results.obs.items():
        cells.obs[name] = values
    for name, embedding in results.obsm.items():
        cells.obsm[name] = embedding
    for name, found in results.uns.items():
        cells.uns[name] = {**cells.uns.get(name, {}), **found} if isinstance(found, dict) else found


def _quality(found: Annotated, certain: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Quality of an annotation for uns; `certain`, bool (annotated cells,), are the cells that are not unknown."""
    annotation = found.annotation
    quality = {
        "classes": annotation.classes,
        "method": found.method,
        **({} if found.n_neighbors is None else {"n_neighbors": found.n_neighbors}),
        **_storable(annotation.facts),
        "held_out_accuracy": {str(name): float(row["accuracy"]) for name, row in annotation.validation.iterrows()},
        "warnings": annotation.warnings,
    }
    if found.n_with_counts:
        quality["baseline_cells"] = found.n_with_counts
        quality["agreement"] = {
            name: _share(labels_of(annotation, values)[certain] == annotation.labels[certain])
            for name, values in (annotation.compared | annotation.members).items()
            if name != found.method
        }
    if len(annotation.validation):
        quality["held_out"] = annotation.validation.to_dict(orient="index")
        log.info(
            "%s, accuracy on held-out reference cells (by %s): %s",
            found.labels,
            annotation.facts["held_out_by"],
            ", ".join(f"{TITLES[str(name)]} {row['accuracy']:.1%}" for name, row in annotation.validation.iterrows()),
        )
    return quality


def _share(true: npt.NDArray[np.bool_]) -> float:
    return float(true.mean()) if len(true) else float("nan")


def _storable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts without names of types and batches as keys: the keys of an .h5ad must not contain a slash."""
    found = dict(facts)
    if (types := facts.get("found_by_type")) is not None:
        found["found_by_type"] = _arrays(
            pd.DataFrame({"type": list(types), "found": np.array([*types.values()], float)})
        )
    if (batches := facts.get("batches")) is not None:
        found["batches"] = _arrays(pd.DataFrame.from_dict(batches, orient="index").rename_axis("batch").reset_index())
        found["far"] = any(batch["far"] for batch in batches.values())
        found["shift"] = max((batch["shift"] for batch in batches.values()), default=0.0)
    return found


def _arrays(table: pd.DataFrame) -> dict[str, npt.NDArray[Any]]:
    return {str(name): values.to_numpy() for name, values in table.items()}


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
