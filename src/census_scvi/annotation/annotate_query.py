"""Open a query and its labelled cells as settings describe them, and annotate the query."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import anndata as ad
import numpy as np
import numpy.typing as npt

from census_scvi.annotation.annotate_labels import annotate_labels
from census_scvi.annotation.cost import effort
from census_scvi.annotation.labelled.joined import Joined, alone, join
from census_scvi.annotation.labelled.labels import column_of, read_labels
from census_scvi.annotation.labelled.reference import Reference, reference_in_census, reference_in_file
from census_scvi.annotation.labelled.several_values import split_labels
from census_scvi.annotation.methods import EMBEDDED
from census_scvi.annotation.protocol import Annotated
from census_scvi.annotation.settings import AnnotateSection, ReferenceSection
from census_scvi.census.open import open_census
from census_scvi.census.settings import CensusSection
from census_scvi.errors import UserError
from census_scvi.model.published import load_described
from census_scvi.query.cells import QueryCells, QuerySource, opened
from census_scvi.query.mapping import Mapper

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """A query and its labelled cells, open.

    Attributes
    ----------
    query
        The query's cells.
    place
        Place of the query's raw counts.
    reference
        The labelled cells.
    rows
        int64 (cells to annotate,): their rows in the query.
    same_file
        Whether the labelled cells are the other rows of the query.
    n_top_genes
        As of `join`.
    split_labels
        Whether labelled cells with several values count for each of them, see `split_labels`.
    """

    query: QueryCells
    place: str
    reference: Reference
    rows: npt.NDArray[np.int64]
    same_file: bool
    n_top_genes: int | None = None
    split_labels: bool = False

    def join(self, batch_key: list[str] | None, min_share: float) -> Joined:
        """Reference and query with the same genes, or the reference alone if all cells have a label; errors as of
        `joined.join`.
        """
        joined = self._joined(batch_key, min_share)
        return split_labels(joined) if self.split_labels else joined

    def _joined(self, batch_key: list[str] | None, min_share: float) -> Joined:
        if not len(self.rows):
            return alone(self.reference, self.n_top_genes)
        return join(
            self.query,
            self.reference,
            counts=self.place,
            batch_key=batch_key,
            min_share=min_share,
            n_top_genes=self.n_top_genes,
            rows=self.rows,
            same_file=self.same_file,
        )


@contextmanager
def open_sources(
    query: QueryCells,
    place: str,
    labels: Sequence[str],
    settings: ReferenceSection,
    census: CensusSection,
    *,
    reference: QuerySource | None = None,
    same_file: bool = False,
    all_labelled: bool = False,
    split_labels: bool = False,
    seed: int = 0,
) -> Iterator[Sources]:
    """Open the labelled cells of a query.

    Parameters
    ----------
    query, place
        The open query, and the place of its raw counts.
    labels
        Columns to predict: obs columns of the labels, unless `settings` has others.
    settings
        What to read of the labelled cells.
    census
        Census of the labelled cells, and organism of a file whose genes have no Ensembl id.
    reference
        Labelled cells; None: the Census.
    same_file
        The labelled cells are those of the query that have a label in the first column.
    all_labelled
        Whether all cells of the query may have a label.
    split_labels
        As of `Sources`.
    seed
        Seed of the choice of labelled cells.

    Raises
    ------
    UserError
        Labels, genes or counts cannot be used; all cells of the query have a label or, of the same file, none has.
    """
    columns = label_columns(labels, settings)
    with ExitStack() as stack:
        if same_file:
            rows = _unlabelled(query, columns[labels[0]], required=not all_labelled)
            settings = settings.model_copy(update={"counts": place})
            found = reference_in_file(query, settings, columns, census.organism, seed)
        elif reference is not None:
            cells = reference if isinstance(reference, QueryCells) else QueryCells(reference, settings.values)
            found = reference_in_file(stack.enter_context(opened(cells)), settings, columns, census.organism, seed)
            rows = np.arange(len(query))
        else:
            found = reference_in_census(stack.enter_context(open_census(census)), settings, columns, seed)
            rows = np.arange(len(query))
        yield Sources(query, place, found, rows, same_file, settings.n_top_genes, split_labels)


def label_columns(labels: Sequence[str], settings: ReferenceSection) -> dict[str, str]:
    """The reference's obs column of the labels for each column to predict; UserError if their numbers differ."""
    theirs = settings.labels or labels
    if len(theirs) != len(labels):
        raise UserError(
            f"annotate.reference.labels names {len(theirs)} column{'s' * (len(theirs) != 1)} ({', '.join(theirs)}),"
            f" query.labels {len(labels)} ({', '.join(labels)}); give as many in the same order, or null for the same"
            " names"
        )
    return dict(zip(labels, theirs, strict=True))


def _unlabelled(query: QueryCells, column: str, *, required: bool) -> npt.NDArray[np.int64]:
    where = f"{query.name}: obs[{column!r}]"
    labels = read_labels(column_of(query.obs, column, query.name, "annotate.reference.labels"), where)
    rows = np.flatnonzero([label is None for label in labels])
    if required and not len(rows):
        raise UserError(
            f"{where} has a label for all {len(query):,} cells, so there is nothing to annotate; give the cells to"
            " annotate the label 'Unlabeled', or give other cells as query or as reference"
        )
    return rows


def annotate_joined(joined: Joined, settings: AnnotateSection, seed: int, model: str | None = None) -> list[Annotated]:
    """Annotate the query with the method of the settings, within the budget, once per column of labels.

    Parameters
    ----------
    joined
        Reference and query.
    settings
        Method, overrides and budget.
    seed
        Seed of everything that is random.
    model
        Model that embeds all cells for the method `neighbors`.
    """
    cells = joined.cells
    plan = effort(settings, len(cells), cells.n_reference)
    if plan.note:
        log.warning("%s", plan.note)
        joined = replace(joined, notes=[plan.note, *joined.notes])
    if plan.method == EMBEDDED:
        joined = replace(joined, cells=replace(cells, embedding=_embedding(joined, model)))
    return annotate_labels(joined, plan.method, seed=seed, **plan.of_method)


def _embedding(joined: Joined, model: str | None) -> npt.NDArray[np.float32]:
    """Embedding of all cells by a trained model."""
    if model is None:
        raise UserError(
            "annotate.method neighbors needs the embedding of a trained model: give a published model in query.model,"
            " or"
            " use scvi-map-query.py"
        )
    cells = ad.AnnData(joined.cells.counts)
    cells.var_names = joined.cells.genes
    return Mapper(*load_described(model))(cells).latent
