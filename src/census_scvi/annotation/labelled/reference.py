"""Labelled cells to learn from: a file, or a slice of a Census."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.annotation.labelled.labels import (
    Labels,
    coded,
    column_of,
    read_labels,
    require_types,
    warn_of_single_studies,
)
from census_scvi.annotation.labelled.sample import draw_balanced
from census_scvi.annotation.ontology import term_column, terms_in
from census_scvi.annotation.settings import ReferenceSection
from census_scvi.census.cells import require_columns, select_cells
from census_scvi.census.gene_ids import strip_version
from census_scvi.census.gene_rows import clean_names, find_gene_rows, name_columns
from census_scvi.census.genes import read_var
from census_scvi.census.open import Census
from census_scvi.census.schema import ORGANISMS
from census_scvi.census.slices import read_counts_of, read_obs_of
from census_scvi.config.random_streams import Stream, generator
from census_scvi.counts.matching_rows import matching_rows
from census_scvi.errors import UserError
from census_scvi.query.batches import batches_of
from census_scvi.query.cells import QueryCells

log = logging.getLogger(__name__)

# Columns that name a study or donor, as the Census has them; a query is of another study than its reference.
STUDY_COLUMNS = ("dataset_id", "donor_id")
# Columns that often hold the study or the batch, to propose.
_BATCHES = (
    "dataset_id", "dataset", "study", "batch", "sample", "sample_id", "donor_id", "donor", "library", "patient",
    "orig.ident",
)  # fmt: skip
_OF_CENSUS = 500  # default maximum number of cells per label
_ROWS, _SAMPLE = 4096, 500
_SYMBOLS = ("feature_name", "gene_symbols", "gene_symbol", "symbol", "gene_name", "gene_names", "Gene", "name")
Columns = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reference:
    """Labelled cells whose counts are read for the genes that are needed.

    Attributes
    ----------
    name
        Description, for messages.
    organism
        Organism of the genes.
    genes, symbols
        feature_ids (or the names in the file), and the symbols of genes by feature_id.
    labels
        object (cells,): label of each cell, by name of the column that is predicted; None in all but the first: the
        cell has no label in this column.
    units
        What can be held out, object (cells,) by name of the column, the best first: study, donor; empty: not known.
    terms
        For each column: term of the Cell Ontology by label, if the reference has them.
    notes
        What was excluded or is not known, one sentence each.
    counts
        Function that reads raw counts, CSR float32 (cells, some genes), from positions of genes.
    sample
        Function that reads raw counts of some of the cells, CSR (some cells, all genes).
    """

    name: str
    organism: str
    genes: list[str]
    symbols: Mapping[str, str]
    labels: Mapping[str, Labels]
    units: Mapping[str, Labels]
    terms: Mapping[str, Mapping[str, str]]
    counts: Callable[[Columns], sp.csr_matrix]
    sample: Callable[[], sp.csr_matrix]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(next(iter(self.labels.values())))

    @property
    def batch(self) -> Labels:
        """Batch of each cell, object (cells,): its study."""
        return next(iter(self.units.values()), np.full(len(self), "", dtype=object))

    def share(self, _: sp.csr_matrix, genes: npt.NDArray[np.bool_]) -> float:
        """Share of the counts of these cells in some genes, bool (genes,)."""
        totals = np.asarray(self.sample().sum(axis=0, dtype=np.float64)).ravel()
        return float(totals[genes].sum() / totals.sum()) if totals.sum() else float("nan")


def reference_in_census(census: Census, settings: ReferenceSection, labels: Mapping[str, str], seed: int) -> Reference:
    """A slice of a Census, with the same maximum number of cells of every label of the first column.

    Parameters
    ----------
    census
        The open Census; it stays open while counts are read.
    settings
        Filter, numbers of cells and columns.
    labels
        obs columns of the labels, by name of the column that is predicted.
    seed
        Seed of the choice of the cells.

    Raises
    ------
    UserError
        A column does not exist, the filter cannot be used or matches no cell, or there are too few labels.
    """
    columns = settings.batch_key or list(STUDY_COLUMNS)
    first = next(iter(labels.values()))
    require_columns(census, list(labels.values()), "annotate.reference.labels")
    require_columns(census, columns, "annotate.reference.batch_key")
    with_terms = [term_column(each) for each in labels.values()]
    with_terms = [each for each in with_terms if each in census.experiment.obs.schema.names]
    setting = "annotate.reference.obs_filter"
    cells = select_cells(census, settings.obs_filter, [first], setting)  # the "batch" is the label
    name = f"{census.identity['uri']} ({census.identity['organism']})"
    of_batch, names = coded(read_labels(pd.Series(cells.batches, dtype=object), f"obs[{first!r}]"))
    codes = of_batch[cells.batch_codes]
    rows = require_types(codes, names, name, f"obs[{first!r}]")
    per_type = settings.cells_per_type or _OF_CENSUS
    rows = rows[draw_balanced(codes[rows], settings.max_cells, _numbers(seed), per_type=per_type)]
    joinids = cells.joinids[rows]
    obs = read_obs_of(census, joinids, list(dict.fromkeys([*labels.values(), *columns, *with_terms])))
    log.info(
        "reference: %s of %s cells of %s, at most %s per label",
        f"{len(joinids):,}", f"{len(cells):,}", name, f"{per_type:,}",
    )  # fmt: skip
    var = read_var(census)
    genes = var["feature_id"].astype(str).tolist()
    everything = var["soma_joinid"].to_numpy()

    def counts(chosen: Columns, cells: npt.NDArray[np.int64] = joinids) -> sp.csr_matrix:
        return sp.vstack([block.counts for block in read_counts_of(census, cells, everything[chosen])], format="csr")

    def sample() -> sp.csr_matrix:
        return counts(np.arange(len(genes)), joinids[:: max(1, len(joinids) // _SAMPLE)])

    return _reference(
        name=name,
        organism=str(census.identity["organism"]),
        genes=genes,
        symbols=dict(zip(genes, var["feature_name"].astype(str), strict=True)),
        columns=labels,
        first=np.array(names, dtype=object)[codes[rows]],
        obs=obs,
        batch_key=settings.batch_key,
        counts=counts,
        sample=sample,
    )


def reference_in_file(
    cells: QueryCells,
    settings: ReferenceSection,
    labels: Mapping[str, str],
    organism: str,
    seed: int,
    *,
    setting: str = "",
) -> Reference:
    """The cells of a file that have a label in the first column.

    Parameters
    ----------
    cells
        The open file; it stays open while counts are read.
    settings, labels, seed
        As for `reference_in_census`.
    organism
        Organism of cells whose genes have no Ensembl id.
    setting
        Setting or argument that names the place of the counts, for messages.

    Raises
    ------
    UserError
        There are no raw counts, genes or labels, or a column does not exist.
    """
    place = cells.find_counts(settings.counts, setting=setting or "annotate.reference.counts=")
    names, symbols, selection, organism = _genes_of(cells.var(place), cells.name, organism)
    for each in labels.values():
        column_of(cells.obs, each, cells.name, "annotate.reference.labels")
    first = next(iter(labels.values()))
    column = f"obs[{first!r}]"
    of_cell = read_labels(cells.obs[first], f"{cells.name}: {column}")
    if settings.obs_filter is not None:
        of_cell[~_matching(cells, settings.obs_filter)] = None
    codes, labelled = coded(of_cell)
    rows = require_types(codes, labelled, cells.name, column)
    rows = rows[draw_balanced(codes[rows], settings.max_cells, _numbers(seed), per_type=settings.cells_per_type)]
    log.info("reference: %s labelled cells of %s", f"{len(rows):,}", cells.name)

    def read(chosen: Columns, wanted: npt.NDArray[np.int64] = rows) -> sp.csr_matrix:
        return sp.vstack(list(_rows_of(cells, place, wanted, selection[:, chosen])), format="csr")

    def sample() -> sp.csr_matrix:
        return cells.sample(place) @ selection

    obs = cells.obs.iloc[rows]
    return _reference(
        name=cells.name,
        organism=organism,
        genes=names,
        symbols=symbols,
        columns=labels,
        first=of_cell[rows],
        obs=obs,
        batch_key=settings.batch_key,
        counts=read,
        sample=sample,
    )


def _reference(
    *, columns: Mapping[str, str], first: Labels, obs: pd.DataFrame, batch_key: list[str] | None, **parts: Any
) -> Reference:
    """The reference with all labels and the studies of its cells; `first`: labels of the first column."""
    others = list(columns.items())[1:]
    labels = {next(iter(columns)): first} | {name: _further(obs, each, parts["name"]) for name, each in others}
    for column in batch_key or []:
        column_of(obs, column, str(parts["name"]), "annotate.reference.batch_key")
    studies = [batch_key] if batch_key else [[column] for column in STUDY_COLUMNS if column in obs]
    units = {"+".join(each): batches_of(obs, each) for each in studies}
    units = {name: values for name, values in units.items() if len(set(values.tolist())) > 1}
    notes = [
        note
        for name, values in list(units.items())[:1]
        for column, found in labels.items()
        if (note := warn_of_single_studies(found, values, column, name))
    ]
    if not units and not batch_key and (likely := likely_batches(obs)):
        notes.append(
            f"the studies of {parts['name']} are not known, so that random cells are held out; obs has"
            f" {', '.join(likely)}: annotate.reference.batch_key=[{likely[0]}]"
        )
        log.warning("%s", notes[-1])
    terms = {name: terms_in(obs, each) for name, each in columns.items()}
    return Reference(labels=labels, units=units, terms=terms, notes=notes, **parts)


def _further(obs: pd.DataFrame, column: str, name: str) -> Labels:
    """Labels of a column after the first one; None also for a label that one cell has."""
    where = f"obs[{column!r}]"
    found = read_labels(obs[column], f"{name}: {where}")
    kept = np.full(len(found), None, dtype=object)
    rows = require_types(*coded(found), name, where)
    kept[rows] = found[rows]
    return kept


def likely_batches(obs: pd.DataFrame) -> list[str]:
    """Columns of obs that may hold the batches, by their names."""
    return [name for name in _BATCHES if name in obs and 1 < obs[name].nunique() <= len(obs) // 2]


def _numbers(seed: int) -> np.random.Generator:
    return generator(seed, Stream.REFERENCE_CELLS)


def _rows_of(
    cells: QueryCells, place: str, rows: npt.NDArray[np.int64], selection: sp.csr_matrix
) -> Iterator[sp.csr_matrix]:
    """Counts of some rows (ascending) in blocks, CSR float32 (some cells, genes of `selection`)."""
    for start, block in cells.blocks(place, _ROWS):
        first, last = np.searchsorted(rows, [start, start + block.shape[0]])
        if first < last:
            chosen = (block[rows[first:last] - start] @ selection).astype(np.float32)
            chosen.sort_indices()
            yield chosen


def _genes_of(var: pd.DataFrame, name: str, organism: str) -> tuple[list[str], dict[str, str], sp.csr_matrix, str]:
    """Genes of a file: names (unique), symbols by name, CSR (columns, genes) of 0 and 1, and organism."""
    places = {where: clean_names(names) for where, names in name_columns(var)}
    ensembl = {where: strip_version(names).str.fullmatch(r"ENS[A-Z]*G\d{11}") for where, names in places.items()}
    best = max(places, key=lambda where: int(ensembl[where].sum()))
    found = [key for key, each in ORGANISMS.items() if places[best].str.match(each.gene_id_prefix + r"\d").mean() > 0.5]
    organism = found[0] if found else organism
    if not ensembl[best].any():
        best = "var_names"
        if places[best].str.fullmatch(r"\d*").all():
            raise UserError(
                f"{name} has no names of genes: var_names are {places[best].iloc[0]!r}, ...; put Ensembl ids or symbols"
                " into var_names"
            )
    kept = find_gene_rows(var, organism).is_gene
    ids = strip_version(places[best])
    codes, names = pd.factorize(ids.where(kept & (ids != "").to_numpy()))
    rows = np.flatnonzero(codes >= 0)
    selection = sp.csr_matrix((np.ones(len(rows)), (rows, codes[rows])), shape=(len(var), len(names)))
    other = next((f"var[{each!r}]" for each in _SYMBOLS if f"var[{each!r}]" in places), "var_names")
    symbols = {} if other == best else dict(zip(ids, places[other], strict=True))
    return names.astype(str).tolist(), symbols, selection, organism


def _matching(cells: QueryCells, text: str) -> npt.NDArray[np.bool_]:
    """Cells of a file that match a value filter, bool (cells,)."""
    setting = "annotate.reference.obs_filter"
    return matching_rows(text, lambda name: column_of(cells.obs, name, cells.name, setting), setting, cells.name)
