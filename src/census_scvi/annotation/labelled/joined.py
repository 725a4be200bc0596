"""Reference and query together: shared genes, batches, and what is excluded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.annotation.labelled.genes import variable_genes
from census_scvi.annotation.labelled.labels import Labels, column_of
from census_scvi.annotation.labelled.reference import Reference, likely_batches
from census_scvi.annotation.protocol import Cells
from census_scvi.counts.row_hash import row_hashes
from census_scvi.errors import UserError
from census_scvi.query.alignment import AlignedCells, AlignmentReport
from census_scvi.query.batches import batches_of
from census_scvi.query.cells import QueryCells
from census_scvi.terminal.progress import progress_bar

log = logging.getLogger(__name__)

_ROWS = 4096
_FEWEST_GENES = 50
# Share of the reference's cells that may also be in the query.
_MOST_COPIES = 0.5


@dataclass(frozen=True)
class Joined:
    """Reference and query, ready for annotators.

    Attributes
    ----------
    cells
        Counts and batches of reference and query; cells without counts in the shared genes are excluded.
    labels
        Labels of the reference by name of the column that is predicted: object (reference cells,), None for a cell
        without a label.
    units
        What can be held out of the reference, by name of the column: `Reference.units`.
    query_rows
        int64 (query cells,): row of each query cell in the source.
    batches_known
        Whether the batches of the query are known.
    symbols
        Symbol of each gene.
    terms
        For each column: term of the Cell Ontology by label, if the reference has them.
    notes
        What was excluded or is not known, one sentence each.
    """

    cells: Cells
    labels: dict[str, Labels]
    units: dict[str, Labels]
    query_rows: npt.NDArray[np.int64]
    batches_known: bool
    symbols: list[str]
    terms: Mapping[str, Mapping[str, str]]
    notes: list[str] = field(default_factory=list)


def join(
    query: QueryCells,
    reference: Reference,
    *,
    counts: str | None,
    batch_key: list[str] | None,
    min_share: float,
    n_top_genes: int | None = None,
    rows: npt.NDArray[np.int64] | None = None,
    same_file: bool = False,
) -> Joined:
    """Bring a query and its reference to the same genes.

    Parameters
    ----------
    query, reference
        The open cells.
    counts
        Place of the query's raw counts; None: searched.
    batch_key
        obs columns of the query whose combinations are its batches; None: not known.
    min_share
        Required share of the reference's genes (`AlignedCells`).
    n_top_genes
        Number of genes, the most variable ones of the reference among the shared ones; None: all shared ones.
    rows
        Rows of the query's cells in the source; None: all.
    same_file
        Whether the reference is the rest of the same source, so that equal names of batches are the same batch.

    Raises
    ------
    UserError
        Too few genes are shared, a column does not exist, or the query is the reference.
    """
    batches = query_batches(query, batch_key)
    aligned = AlignedCells(
        query,
        reference.genes,
        reference.symbols,
        reference.organism,
        min_share=min_share,
        counts=counts,
        expected=reference.share,
        owner="reference",
    )
    shared = aligned.shared
    if len(shared) < _FEWEST_GENES:
        raise UserError(
            f"{query.name} and {reference.name} share {len(shared)} genes; at least {_FEWEST_GENES} are needed"
        )
    own = _read(aligned, shared)
    rows = np.arange(len(query)) if rows is None else rows
    theirs = reference.counts(shared)
    log.info("%s", _genes_in_words(aligned.report, len(shared), reference))
    if n_top_genes is not None and n_top_genes < len(shared):
        chosen = variable_genes(theirs, reference.batch, n_top_genes)
        own, theirs, shared = own[:, chosen], theirs[:, chosen], shared[chosen]
        log.info("the %s most variable genes of the reference are used", f"{len(shared):,}")
    filled, labelled = _filled(own[rows]), _filled(theirs)
    notes = list(reference.notes)
    if empty := len(rows) - len(filled):
        notes.append(f"{empty:,} cells without counts in the {len(shared):,} genes that are used cannot be annotated")
        log.warning("%s", notes[-1])
    if not len(filled):
        raise UserError(
            f"none of {len(rows):,} cells of {query.name} has counts in the {len(shared):,} genes that are used"
        )
    rows = rows[filled]
    if not same_file:
        labelled, note = _without_copies(theirs, labelled, own[rows], query.name, reference.name)
        notes += note
    if batch_key is None:
        log.warning("%s", _without_batches(query.obs))
    prefix = ("", "") if same_file else ("reference ", "query ")
    batch = [f"{prefix[0]}{name}" for name in reference.batch[labelled]] + [
        f"{prefix[1]}{name}" for name in batches[rows]
    ]
    genes = [reference.genes[column] for column in shared]
    return Joined(
        cells=Cells(
            counts=sp.vstack([theirs[labelled], own[rows]], format="csr").astype(np.float32),
            batch=np.array(batch, dtype=object),
            n_reference=len(labelled),
            genes=genes,
            query_prefix=prefix[1],
        ),
        labels={name: values[labelled] for name, values in reference.labels.items()},
        units={name: values[labelled] for name, values in reference.units.items()},
        query_rows=rows,
        batches_known=batch_key is not None,
        symbols=[str(reference.symbols.get(gene, gene)) for gene in genes],
        terms=reference.terms,
        notes=notes,
    )


def alone(reference: Reference, n_top_genes: int | None = None) -> Joined:
    """A reference without a query, for a classifier of labelled cells only; `n_top_genes` as in `join`."""
    counts = reference.counts(np.arange(len(reference.genes)))
    expressed = np.flatnonzero(counts.getnnz(axis=0))
    if n_top_genes is not None and n_top_genes < len(expressed):
        expressed = variable_genes(counts, reference.batch, n_top_genes)
    genes = [reference.genes[column] for column in expressed]
    none = np.empty(0, np.int64)
    return Joined(
        cells=Cells(counts[:, expressed], reference.batch, len(reference), genes),
        labels=dict(reference.labels),
        units=dict(reference.units),
        query_rows=none,
        batches_known=False,
        symbols=[str(reference.symbols.get(gene, gene)) for gene in genes],
        terms=reference.terms,
        notes=list(reference.notes),
    )


def query_batches(query: QueryCells, batch_key: list[str] | None) -> Labels:
    """Batch of each query cell, object (cells,): the combination of values of some obs columns.

    Raises
    ------
    UserError
        There is no such column, or it has about as many values as there are cells.
    """
    for column in batch_key or []:
        values = column_of(query.obs, column, query.name, "query.batch_key")
        if values.nunique() > max(len(query) // 2, 1):
            raise UserError(
                f"query.batch_key contains {column!r}, which has {values.nunique():,} values in {len(query):,} cells;"
                " expected a column of batches, such as samples or donors"
            )
    return batches_of(query.obs, batch_key or [])


def _without_batches(obs: pd.DataFrame) -> str:
    likely = likely_batches(obs)
    proposal = f"; obs has {', '.join(likely)}: query.batch_key=[{likely[0]}]" if likely else ""
    return (
        "query.batch_key is not set: all cells are treated as one batch, and Harmony, which needs the batches, is not"
        " used."
        f" If they are of several samples or donors, name the obs columns{proposal}"
    )


def _read(aligned: AlignedCells, shared: npt.NDArray[np.int64]) -> sp.csr_matrix:
    parts = []
    with progress_bar(len(aligned), "read the query") as bar:
        for _, block in aligned.blocks(_ROWS):
            parts.append(block[:, shared])
            bar.update(block.shape[0])
    return sp.vstack(parts, format="csr")


def _filled(counts: sp.csr_matrix) -> npt.NDArray[np.int64]:
    return np.flatnonzero(np.asarray(counts.sum(axis=1)).ravel() > 0)


def _genes_in_words(report: AlignmentReport, n_shared: int, reference: Reference) -> str:
    expected = "" if np.isnan(report.expected_share) else f", with {report.expected_share:.1%} of its counts"
    return (
        f"raw counts from {report.counts}, genes from {report.names}: {n_shared:,} of the {len(reference.genes):,}"
        " genes of"
        f" the reference{expected}"
    )


def _without_copies(
    theirs: sp.csr_matrix, labelled: npt.NDArray[np.int64], own: sp.csr_matrix, query: str, reference: str
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Reference cells whose counts no query cell has, and a note; UserError if most are in the query."""
    copies = np.isin(_hashes(theirs[labelled]), _hashes(own))
    if not copies.any():
        return labelled, []
    found = f"{copies.sum():,} of {len(labelled):,} reference cells have the counts of cells of the query"
    if copies.mean() > _MOST_COPIES:
        raise UserError(
            f"{query} is the reference: {found} ({reference}); give labelled cells of another study, or exclude this"
            " one"
            " with annotate.reference.obs_filter"
        )
    log.warning("%s: they are not used", found)
    return labelled[~copies], [f"{found} and were not used"]


def _hashes(counts: sp.csr_matrix) -> npt.NDArray[np.uint64]:
    counts = sp.csr_matrix(counts, dtype=np.float32)
    counts.sort_indices()
    counts.eliminate_zeros()
    return row_hashes(counts)
