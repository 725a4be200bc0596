"""Cells of an atlas as reference: a sample with its embedding, and the counts of some of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.annotation.labelled.joined import Joined
from census_scvi.annotation.labelled.labels import Labels, read_labels
from census_scvi.annotation.labelled.reference import STUDY_COLUMNS
from census_scvi.annotation.labelled.sample import draw_balanced
from census_scvi.annotation.ontology import terms_in
from census_scvi.annotation.protocol import Cells
from census_scvi.errors import UserError
from census_scvi.query.batches import batches_of

log = logging.getLogger(__name__)

_QUERY = "query "  # before the names of the query's batches
Rows = npt.NDArray[np.int64]


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
    most_cells
        Number of reference cells whose counts are read.
    """

    query: sp.csr_matrix
    read_reference: Callable[[Rows], sp.csr_matrix]
    genes: list[str]
    measured: npt.NDArray[np.bool_]
    most_cells: int


def join_atlas(
    cells: ad.AnnData,
    reference: ad.AnnData,
    labels: Sequence[str],
    counts: Counts | None,
    *,
    batch_key: Sequence[str],
    n_neighbors: int,
    seed: int,
    embedding: str,
    latent: str,
) -> Joined:
    """Bring a user's cells and cells of an atlas together.

    Parameters
    ----------
    cells
        The user's cells, with their embedding in obsm.
    reference
        Reference cells; obs has the columns `labels`, dataset_id and donor_id. `<labels>_ontology_term_id`, if there is
        such a column, has the terms of the labels.
    labels
        obs columns of the labels.
    counts
        Counts of both; None: there are none. A sample of the reference with counts is drawn, balanced by the first
        column; if the counts say nothing, they are not used.
    batch_key
        obs columns of the user's cells whose combinations are their batches; empty: not known.
    n_neighbors
        Neighbors per cell.
    seed
        Seed of the sample.
    embedding, latent
        Names of the embedding in the obsm of `cells` and of `reference`.

    Raises
    ------
    UserError
        No cell has a label, or fewer cells than there are neighbors, or a column of batches does not exist.
    """
    known = {column: read_labels(reference.obs[column], f"the reference: obs[{column!r}]") for column in labels}
    for column, values in known.items():
        _require_labels(column, values, reference.obsm[latent], n_neighbors)
    drawn = None if counts is None else _drawn(next(iter(known.values())), counts, seed)
    if drawn is None or counts is None:
        rows, genes = np.arange(reference.n_obs), list[str]()
        both = sp.csr_matrix(np.empty((reference.n_obs + cells.n_obs, 0), np.float32))
        batch = np.full(cells.n_obs, _QUERY, dtype=object)
    else:
        rows, theirs, columns = drawn
        genes = [counts.genes[column] for column in columns]
        both = sp.vstack([theirs, counts.query[:, columns]], format="csr")
        batch = _batches(cells.obs, batch_key)
    for column, values in known.items():
        if not any(label is not None for label in values[rows]):
            raise UserError(f"none of the {len(rows):,} reference cells with counts has a {column}; change obs_filter")
    points = np.concatenate([reference.obsm[latent][rows], cells.obsm[embedding]]).astype(np.float32)
    obs = reference.obs.iloc[rows]
    return Joined(
        cells=Cells(both, np.append(_studies(reference.obs)[rows], batch), len(rows), genes, points, _QUERY),
        labels={column: values[rows] for column, values in known.items()},
        units={name: obs[name].astype(str).to_numpy(dtype=object) for name in STUDY_COLUMNS},
        query_rows=np.arange(cells.n_obs),
        batches_known=bool(batch_key),
        symbols=genes,
        terms={column: terms_in(obs, column) for column in labels},
    )


def _require_labels(column: str, labels: Labels, points: npt.NDArray[np.floating], n_neighbors: int) -> None:
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


def _drawn(labels: Labels, counts: Counts, seed: int) -> tuple[Rows, sp.csr_matrix, Rows] | None:
    """Rows of a sample of the reference, its counts, and their genes; None: the counts say nothing."""
    rows = draw_balanced(labels, counts.most_cells, np.random.default_rng(seed))
    measured = np.flatnonzero(counts.measured)
    found = sp.csr_matrix(counts.read_reference(rows)[:, measured])
    found.eliminate_zeros()
    filled = np.diff(found.indptr) > 0  # all cells without counts look the same
    found, rows = found[np.flatnonzero(filled)], rows[filled]
    genes = np.flatnonzero(found.getnnz(axis=0))
    if len(genes) < 2 or len({label for label in labels[rows] if label is not None}) < 2:
        log.info("the reference has counts of fewer than two genes, or of fewer than two labels")
        return None
    return rows, found[:, genes], measured[genes]


def _studies(obs: pd.DataFrame) -> Labels:
    """Study of each reference cell; its donor, if there is one study."""
    column = next((name for name in STUDY_COLUMNS if obs[name].nunique() > 1), STUDY_COLUMNS[0])
    return ("reference " + obs[column].astype(str)).to_numpy(dtype=object)


def _batches(obs: pd.DataFrame, batch_key: Sequence[str]) -> Labels:
    """Batch of each query cell: the combination of some columns."""
    for column in batch_key:
        if column not in obs:
            have = ", ".join(map(str, obs.columns[:10]))
            raise UserError(f"batch_key: the cells have no obs column {column!r}; obs has {have}")
    return _QUERY + batches_of(obs, list(batch_key))
