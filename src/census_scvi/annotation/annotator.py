"""Annotation of a user's cells with labels of an atlas: writes labels, labels of other methods and their accuracy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.annotation.annotate import FittedMethod
from census_scvi.annotation.labelled.sample import draw_balanced
from census_scvi.annotation.methods import BASELINES, TITLES
from census_scvi.annotation.ontology import Hierarchy, build_hierarchy, terms_in
from census_scvi.annotation.protocol import Annotation, Cells
from census_scvi.annotation.results.columns import annotation_columns, labels_of
from census_scvi.errors import UserError

log = logging.getLogger(__name__)

PREDICTION, EMPTY = "scvi_prediction", "scvi_empty"
EMBEDDED = "neighbors"
_QUERY = "query "  # before the names of the query's batches
_VAGUE = ("unknown", "na", "nan", "None", "")
_STUDY, _DONOR = "dataset_id", "donor_id"
STUDY_COLUMNS = [_STUDY, _DONOR]


@dataclass(frozen=True)
class Counts:
    """Raw counts of reference and query.

    Attributes
    ----------
    query
        CSR (query cells, genes).
    read_reference
        Function of ascending rows of the reference, int64 (cells,), that returns their counts, CSR (cells, genes).
    genes
        feature_ids.
    measured
        bool (genes,): genes that the query has.
    """

    query: sp.csr_matrix
    read_reference: Callable[[npt.NDArray[np.int64]], sp.csr_matrix]
    genes: list[str]
    measured: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Settings:
    """Settings of `annotate_cells`.

    Attributes
    ----------
    method
        As of `FittedMethod`.
    batch_key
        obs columns of the query whose combinations are its batches; empty: not known.
    reference_cells
        Number of reference cells whose counts are read.
    n_neighbors, steps, seed
        As of `FittedMethod`.
    """

    method: str
    batch_key: Sequence[str]
    reference_cells: int
    n_neighbors: int
    steps: int
    seed: int


@dataclass(frozen=True)
class Annotated:
    """One column of labels of the user's cells, and what it was predicted from.

    Attributes
    ----------
    labels
        Name of the column.
    annotation, hierarchy
        The annotation, and the terms of its labels.
    cells
        Reference and query.
    known
        object (reference cells,): labels; None for a cell without one.
    """

    labels: str
    annotation: Annotation
    hierarchy: Hierarchy
    cells: Cells
    known: npt.NDArray[np.object_]


def annotate_cells(
    cells: ad.AnnData,
    reference: ad.AnnData,
    labels: Sequence[str],
    counts: Counts | None,
    settings: Settings,
    *,
    embedding: str,
    latent: str,
) -> list[Annotated]:
    """Write labels, probability, uncertainty and unknown into the obs of the user's cells, and the quality into uns.

    Parameters
    ----------
    cells
        The user's cells, with `obs["scvi_empty"]` and their embedding in obsm.
    reference
        Reference cells; obs has the columns `labels`, dataset_id and donor_id. Cells with an uninformative label such
        as "unknown" are excluded. `<labels>_ontology_term_id`, if there is such a column, has the terms of the labels.
    labels
        obs columns of the labels.
    counts
        Counts of both; None: there are none, and the neighbors in the embedding are used.
    settings
        Method, numbers of cells and seed.
    embedding, latent
        Names of the embedding in the obsm of `cells` and of `reference`.

    Returns
    -------
    The annotations, one per column.

    Raises
    ------
    UserError
        No cell has a label, or fewer cells than there are neighbors, or a column of batches does not exist.
    """
    known = {column: informative_labels(reference.obs[column]) for column in labels}
    for column, values in known.items():
        _require_labels(column, values, reference.obsm[latent], settings.n_neighbors)
    joined = _with_counts(cells, reference, known, counts, settings, embedding, latent) if counts else None
    method = settings.method
    if joined is None:
        if method != EMBEDDED:
            log.warning("there are no counts for method %s, so the neighbors in the embedding are used", method)
        method, rows = EMBEDDED, np.arange(reference.n_obs)
        joined = _without_counts(cells, reference, embedding, latent), rows, bool(settings.batch_key)
    both, rows, with_batches = joined
    fitted = FittedMethod(
        both,
        method,
        compare=() if both.counts.shape[1] == 0 else (EMBEDDED, *BASELINES),
        batches_known=with_batches,
        n_neighbors=settings.n_neighbors,
        steps=settings.steps,
        seed=settings.seed,
    )
    units = {name: reference.obs[name].astype(str).to_numpy(dtype=object)[rows] for name in STUDY_COLUMNS}
    annotated = []
    for column, values in known.items():
        if not any(label is not None for label in values[rows]):
            raise UserError(f"none of the {len(rows):,} reference cells with counts has a {column}; change obs_filter")
        terms = terms_in(reference.obs.iloc[rows], column)
        found = fitted.annotate(values[rows], units, terms)
        hierarchy = build_hierarchy(found.classes, terms)
        _write(cells, column, found, hierarchy, fitted, settings, len(rows) if both.counts.shape[1] else 0)
        annotated.append(Annotated(column, found, hierarchy, both, values[rows]))
    return annotated


def informative_labels(values: pd.Series) -> npt.NDArray[np.object_]:
    """Labels as text, object (cells,); None for missing and uninformative ones."""
    text = values.astype(str).to_numpy(dtype=object)
    vague = values.isna().to_numpy(dtype=bool) | np.isin(text.astype(str), _VAGUE)
    text[vague] = None
    return text


def _require_labels(
    column: str, labels: npt.NDArray[np.object_], points: npt.NDArray[np.floating], n_neighbors: int
) -> None:
    known = np.flatnonzero([label is not None for label in labels])
    if not len(known):
        raise UserError(f"none of the {len(labels):,} reference cells has a {column}; change obs_filter")
    different = len(np.unique(np.asarray(points)[known], axis=0))
    if different <= n_neighbors:
        copies = f", {different:,} of them different," if different < len(known) else ""
        raise UserError(
            f"the reference has {len(known):,} labelled cell{'s' * (len(known) != 1)}{copies} and"
            f" n_neighbors={n_neighbors} needs {n_neighbors + 1} or more; take more reference cells (obs_filter), or"
            " fewer neighbors"
        )


def _without_counts(cells: ad.AnnData, reference: ad.AnnData, embedding: str, latent: str) -> Cells:
    n_cells = reference.n_obs + cells.n_obs
    return Cells(
        sp.csr_matrix(np.empty((n_cells, 0), np.float32)),
        np.append(_reference_batch(reference), np.full(cells.n_obs, _QUERY, dtype=object)),
        reference.n_obs,
        [],
        np.concatenate([reference.obsm[latent], cells.obsm[embedding]]).astype(np.float32),
        _QUERY,
    )


def _with_counts(
    cells: ad.AnnData,
    reference: ad.AnnData,
    known: dict[str, npt.NDArray[np.object_]],
    counts: Counts,
    settings: Settings,
    embedding: str,
    latent: str,
) -> tuple[Cells, npt.NDArray[np.int64], bool] | None:
    """Reference sample and query with counts, rows of the sample, and whether batches are known; None: no counts."""
    first = next(iter(known.values()))
    rows = draw_balanced(first, settings.reference_cells, np.random.default_rng(settings.seed))
    of_reference = sp.csr_matrix(counts.read_reference(rows)[:, counts.measured])
    of_reference.eliminate_zeros()
    filled = np.diff(of_reference.indptr) > 0  # all cells without counts look the same
    of_reference, rows = of_reference[np.flatnonzero(filled)], rows[filled]
    genes = np.flatnonzero(of_reference.getnnz(axis=0))
    if len(genes) < 2 or len({label for label in first[rows] if label is not None}) < 2:
        log.info("the reference has counts of fewer than two genes, or of fewer than two labels")
        return None
    query = counts.query[:, counts.measured]
    names = np.array(counts.genes, dtype=object)[counts.measured]
    batch = _batches(cells.obs, settings.batch_key)
    return (
        Cells(
            sp.vstack([of_reference[:, genes], query[:, genes]], format="csr"),
            np.append(_reference_batch(reference)[rows], batch),
            len(rows),
            [str(name) for name in names[genes]],
            np.concatenate([reference.obsm[latent][rows], cells.obsm[embedding]]).astype(np.float32),
            _QUERY,
        ),
        rows,
        bool(settings.batch_key),
    )


def _reference_batch(reference: ad.AnnData) -> npt.NDArray[np.object_]:
    """Study of each reference cell; its donor, if there is one study."""
    column = next((name for name in STUDY_COLUMNS if reference.obs[name].nunique() > 1), _STUDY)
    return ("reference " + reference.obs[column].astype(str)).to_numpy(dtype=object)


def _batches(obs: pd.DataFrame, batch_key: Sequence[str]) -> npt.NDArray[np.object_]:
    """Batch of each query cell: the combination of some columns."""
    for column in batch_key:
        if column not in obs:
            have = ", ".join(map(str, obs.columns[:10]))
            raise UserError(f"batch_key: the cells have no obs column {column!r}; obs has {have}")
    names = pd.Series(_QUERY, index=obs.index)
    for number, column in enumerate(batch_key):
        names = names + " " * (number > 0) + obs[column].astype(str)
    return names.to_numpy(dtype=object)


def _write(
    cells: ad.AnnData,
    column: str,
    found: Annotation,
    hierarchy: Hierarchy,
    fitted: FittedMethod,
    settings: Settings,
    n_with_counts: int,
) -> None:
    empty = cells.obs[EMPTY].to_numpy(dtype=bool)
    rows = np.arange(cells.n_obs)
    columns = annotation_columns(found, column, rows, len(rows), hierarchy, empty=empty)
    for name, values in columns.items():
        cells.obs[name] = values
    certain = ~columns[f"{column}_unknown"]
    batches = found.facts["batches"]
    quality: dict[str, Any] = {
        "classes": found.classes,
        "method": fitted.method,
        "n_neighbors": settings.n_neighbors,
        **_storable(found.facts),
        "far": any(batch["far"] for batch in batches.values()),
        "shift": max((batch["shift"] for batch in batches.values()), default=0.0),
        "warnings": found.warnings,
    }
    if n_with_counts:
        quality["baseline_cells"] = n_with_counts
        quality["agreement"] = {
            name: float((labels_of(found, values) == found.labels)[certain].mean()) if certain.any() else float("nan")
            for name, values in (found.compared | found.members).items()
            if name != fitted.method
        }
    if len(found.validation):
        quality["held_out"] = found.validation.to_dict(orient="index")
        log.info(
            "%s, accuracy on held-out reference cells (by %s): %s",
            column,
            found.facts["held_out_by"],
            ", ".join(f"{TITLES[str(name)]} {row['accuracy']:.1%}" for name, row in found.validation.iterrows()),
        )
    cells.uns.setdefault(PREDICTION, {})[column] = quality


def _storable(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts without names of types and batches as keys: the keys of an .h5ad must not contain a slash."""
    tables = {
        "found_by_type": pd.Series(facts["found_by_type"], dtype=float).rename_axis("type").reset_index(name="found"),
        "batches": pd.DataFrame.from_dict(facts["batches"], orient="index").rename_axis("batch").reset_index(),
    }
    return facts | {
        name: {str(key): values.to_numpy() for key, values in table.items()} for name, table in tables.items()
    }
