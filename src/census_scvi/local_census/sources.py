"""Sources of the cells of a local Census: a `Source` is one dataset with its labels, genes and counts."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.census.gene_ids import GeneMap, GeneReport, Genes, resolve_genes, strip_version
from census_scvi.census.gene_rows import (
    NAMED_TWICE,
    clean_names,
    find_gene_rows,
    holds_kinds,
    name_columns,
    named_twice,
)
from census_scvi.census.protein_rows import find_protein_rows
from census_scvi.census.schema import ORGANISMS
from census_scvi.counts.h5ad import CountMatrix, check_counts, open_file, read_frame, require_place, unreadable
from census_scvi.counts.proteins import Proteins, find_proteins, protein_features
from census_scvi.counts.raw_counts import check_place, find_raw_counts, matrices_in, matrix_key, var_key
from census_scvi.errors import UserError
from census_scvi.local_census.h5ad_labels import census_labels, label_text, table_column

log = logging.getLogger(__name__)


class Source(Protocol):
    """One dataset of a Census to be built.

    Attributes
    ----------
    dataset_id, title
        Id of the dataset (unique in a Census) and its title.
    organism
        Experiment of the Census, such as `homo_sapiens`.
    path
        File of the cells; "" if there is none.
    genes
        Numbers of kept and dropped genes of the file.
    var
        feature_id (unique), feature_name, feature_length (int64), feature_type; one row per gene.
    obs
        One row per cell: the Census' label columns (categorical or str, no missing values), is_primary_data (bool),
        and observation_joinid if the file has it.
    kept_counts
        float64 (cells,): share of each cell's counts that are in the genes of `var`, filled by `blocks`; 1 for a
        cell without counts.
    proteins
        Names of the measured proteins, all different; empty if there are none.
    """

    dataset_id: str
    title: str
    organism: str
    path: str
    genes: GeneReport
    var: pd.DataFrame
    obs: pd.DataFrame
    kept_counts: npt.NDArray[np.float64]
    proteins: list[str]

    def blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, raw counts of at most `rows` cells x genes of `var`) in the order of `obs`.

        The CSR matrix has no duplicates; it may have explicit zeros. May be called several times.
        """
        ...

    def protein_blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, raw counts of at most `rows` cells x proteins), in the order of `obs`; none without any."""
        ...


class H5adSource:
    """All cells of an .h5ad, or those in `rows`, read in blocks of rows.

    Use `open_h5ad` to create one.
    """

    def __init__(
        self,
        path: Path,
        *,
        dataset_id: str,
        title: str,
        organism: str,
        counts: str,
        genes: Genes,
        proteins: tuple[str, list[str]] | None,
        obs: pd.DataFrame,
        rows: npt.NDArray[np.int64],
        counted: npt.NDArray[Any],
    ) -> None:
        self.path, self.dataset_id, self.title, self.organism = str(path), dataset_id, title, organism
        self.genes, self.var, self.obs = genes.report, genes.var, obs
        self.kept_counts = np.ones(len(rows))
        self._counts, self._rows = counts, rows
        self._protein_place, self.proteins = proteins or ("", [])
        self._column_to_gene, self._counted = genes.column_to_gene, counted.astype(np.float64)

    def blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, raw counts of at most `rows` cells x genes); UserError if they are not raw counts."""
        return regroup(self._selected(rows), rows)

    def protein_blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, raw counts of at most `rows` cells x proteins); UserError if they are not raw counts."""
        return regroup(self._selected_proteins(rows) if self.proteins else (), rows)

    def _selected_proteins(self, rows: int) -> Iterator[sp.csr_matrix]:
        """Protein counts of the cells of this dataset in each block of the file."""
        with open_file(Path(self.path)) as file:
            proteins = _find_proteins(file, self.path, self._counts, self._protein_place)
            assert proteins is not None, "they were found when the file was opened"
            for start, block in proteins.blocks(rows, first=int(self._rows[0]), last=int(self._rows[-1]) + 1):
                first, last = np.searchsorted(self._rows, [start, start + block.shape[0]])
                if first < last:
                    yield block[self._rows[first:last] - start]

    def _selected(self, rows: int) -> Iterator[sp.csr_matrix]:
        """The cells of this dataset in each block of the file, with columns mapped to genes."""
        with open_file(Path(self.path)) as file:
            matrix = CountMatrix(file, matrix_key(file, self._counts))
            try:
                for start, block in matrix.blocks(rows, first=int(self._rows[0]), last=int(self._rows[-1]) + 1):
                    first, last = np.searchsorted(self._rows, [start, start + block.shape[0]])
                    if first == last:
                        continue
                    check_counts(block, where=f"{self.path}: {self._counts}", first_row=start)
                    own = block[self._rows[first:last] - start]
                    self.kept_counts[first:last] = self._share_kept(own)
                    yield self._to_genes(own)
            except (OSError, KeyError) as error:
                raise unreadable(self.path, error) from error

    def _share_kept(self, block: sp.csr_matrix) -> npt.NDArray[np.float64]:
        """Share of each cell's gene counts that are in kept genes; 1 for a cell without counts."""
        total = block @ self._counted
        kept = block @ (self._column_to_gene >= 0).astype(np.float64)
        return np.where(total > 0, kept / np.where(total > 0, total, 1.0), 1.0)

    def _to_genes(self, block: sp.csr_matrix) -> sp.csr_matrix:
        """Map columns of the file to genes: drop columns without a gene, and sum columns of the same gene."""
        gene = self._column_to_gene[block.indices]
        row = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
        keep = gene >= 0
        # float64, so that sums are exact when they are compared with the limit of X/raw.
        entries = (block.data[keep].astype(np.float64), (row[keep], gene[keep]))
        return sp.csr_matrix(entries, shape=(block.shape[0], len(self.var)))


def regroup(blocks: Iterable[sp.csr_matrix], rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Yield (first row, block) with `rows` rows each (the last may have fewer), from blocks of any size, in order."""
    start = n_waiting = 0
    waiting: list[sp.csr_matrix] = []
    for block in blocks:
        waiting.append(block)
        n_waiting += block.shape[0]
        if n_waiting < rows:
            continue
        joined = sp.vstack(waiting, format="csr") if len(waiting) > 1 else block
        whole = n_waiting - n_waiting % rows
        for first in range(0, whole, rows):
            yield start + first, joined[first : first + rows]
        start, n_waiting, waiting = start + whole, n_waiting - whole, [joined[whole:]]
    if n_waiting:
        yield start, sp.vstack(waiting, format="csr")


def open_h5ad(
    path: Path,
    *,
    dataset_id: str | None = None,
    dataset_column: str | None = None,
    title: str | None = None,
    organism: str,
    counts: str | None = None,
    proteins: str | None = None,
    gene_id: str | None = None,
    obs_columns: Mapping[str, str] | None = None,
    values: Mapping[str, str | bool] | None = None,
    gene_map: GeneMap | None = None,
    keep_without_id: bool = False,
    min_recognised: float = 0.5,
) -> list[H5adSource]:
    """Open an .h5ad with raw counts as one dataset, or as one dataset per value of the obs column `dataset_column`.

    `obs_columns` maps Census columns to columns of the file. `values` sets Census columns to one value for all cells.
    Without either, a column of the file with a Census name is used as it is. All other columns are "unknown" or "na",
    and is_primary_data is True. `counts` is X, raw or layers/<name>; None: the raw counts are searched in all of them
    (`census_scvi.counts.raw_counts`). `proteins` is obsm/<name>, features or none; None: the proteins are searched
    (`census_scvi.counts.proteins`). `gene_id` is index or a column of var; None: the one with the most recognised
    genes. Raises UserError, with the name of the file, if the file is missing, damaged or unsuitable.
    """
    try:
        with open_file(path) as file:
            table = read_frame(file, "obs")
            place = _find_counts(file, path, counts, len(table))
            var = read_frame(file, var_key(file, place))
            found = _find_proteins(file, str(path), place, proteins)
    except (OSError, KeyError, ValueError) as error:
        raise unreadable(str(path), error) from error
    log.info("%s: using the raw counts in %s", path, place)
    if found is not None:
        log.info("%s: using the %d proteins in %s", path, len(found.names), found.place)
    genes, counted = _find_genes(
        path,
        table,
        var,
        organism,
        gene_id,
        gene_map,
        keep_without_id=keep_without_id,
        min_recognised=min_recognised,
    )
    labels = census_labels(table, path=path, organism=organism, columns=obs_columns or {}, values=values or {})
    sources = []
    for name, rows in _datasets(table, path, dataset_id, dataset_column):
        sources.append(
            H5adSource(
                path,
                dataset_id=name,
                title=title if title and dataset_column is None else f"{title}: {name}" if title else name,
                organism=organism,
                counts=place,
                genes=genes,
                proteins=None if found is None else (found.place, found.names),
                obs=labels.iloc[rows].reset_index(drop=True),
                rows=rows,
                counted=counted,
            )
        )
    return sources


def _find_counts(file: h5py.File, path: Path, asked: str | None, n_cells: int) -> str:
    """Name of the requested matrix, or of the one with raw counts; UserError if there is none."""
    matrices, setting = matrices_in(file), "counts: "
    if not matrices:
        raise UserError(f"{path}: has no X, raw or layers; nothing to build from")
    names = {key: read_frame(file, key).index for key in {var_key(file, place) for place in matrices}}
    n_genes = max((len(index) for index in names.values()), default=0)
    if not n_cells or not n_genes:
        raise UserError(f"{path}: has {n_cells} cells and {n_genes} genes; nothing to build from")
    if asked is None and len(matrices) > 1:
        return find_raw_counts(
            matrices, lambda place: names[var_key(file, place)], n_cells, name=str(path), setting=setting
        )
    place = asked or next(iter(matrices))
    require_place(place, list(matrices), str(path))
    n_genes = len(names[var_key(file, place)])
    check_place(place, matrices, n_cells, n_genes, name=str(path), setting=setting, asked=asked is not None)
    return place


def _find_proteins(file: h5py.File, path: str, counts: str, asked: str | None) -> Proteins | None:
    """Protein counts of a file; features are those of the matrix `counts`. None if there are none."""
    matrix, where = CountMatrix(file, matrix_key(file, counts)), f"{path}: {counts}"
    features = protein_features(matrix, *find_protein_rows(read_frame(file, var_key(file, counts))), where)
    return find_proteins(file, features, asked, n_cells=matrix.shape[0], name=path, setting="proteins: ")


def _find_genes(
    path: Path,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    organism: str,
    gene_id: str | None,
    gene_map: GeneMap | None,
    *,
    keep_without_id: bool,
    min_recognised: float,
) -> tuple[Genes, npt.NDArray[Any]]:
    """The gene of each column of the file, and bool (columns,): whether the column counts as a gene of any organism.

    UserError, with the name of the file, if too few genes are recognised.
    """
    rows = find_gene_rows(var, organism)
    if rows.left_out:
        log.warning("%s: %s", path, rows)
    columns = np.flatnonzero(rows.is_gene)
    if not len(columns):
        raise UserError(f"{path}: {rows}; nothing is left to build from")
    recognised = {
        where: int(_recognised(names[rows.is_gene], organism, gene_map).sum()) for where, names in name_columns(var)
    }
    asked, names = _gene_names(path, var, gene_id, recognised, len(columns))
    proposal = _proposal(asked, recognised, obs, organism, gene_map)
    names = strip_version(clean_names(names)[rows.is_gene])
    if gene_map is not None and (twice := named_twice(names, names.map(gene_map.id_of_symbol))).any():
        log.warning("%s: %s rows are excluded: %s", path, f"{twice.sum():,}", NAMED_TWICE)
        names, columns = names[~twice], columns[~twice]
    try:
        genes = resolve_genes(
            names,
            _attributes(var, asked).iloc[columns],
            organism=organism,
            gene_map=gene_map,
            keep_without_id=keep_without_id,
            min_recognised=min_recognised,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}{proposal and f'; {proposal}'}") from None
    if proposal:
        log.warning("%s: %s", path, proposal)
    column_to_gene = np.full(len(var), -1, dtype=np.int64)
    column_to_gene[columns] = genes.column_to_gene
    report = replace(genes.report, not_genes=len(var) - len(columns))
    return replace(genes, column_to_gene=column_to_gene, report=report), rows.is_expression


def _gene_names(
    path: Path, var: pd.DataFrame, gene_id: str | None, recognised: Mapping[str, int], n_genes: int
) -> tuple[str, pd.Series]:
    """Location of the gene names (requested, or with the most `recognised` genes), and the names, (rows of var,)."""
    asked = _best_place(recognised) if gene_id is None else "var_names" if gene_id == "index" else f"var[{gene_id!r}]"
    if gene_id is None and asked != "var_names":
        numbers = f"{recognised[asked]:,} of {n_genes:,} genes, var_names {recognised['var_names']:,}"
        log.info("%s: using the genes in %s, which has %s", path, asked, numbers)
    places = dict(name_columns(var))
    if asked not in places:
        places[asked] = table_column(var, str(gene_id), f"{path}: var").astype(str)
    return asked, places[asked]


def _best_place(recognised: Mapping[str, int]) -> str:
    return max(recognised, key=recognised.__getitem__)


def _recognised(names: pd.Series, organism: str, gene_map: GeneMap | None) -> pd.Series:
    """Bool per name: an Ensembl id of the organism or a symbol in the gene map."""
    ids = strip_version(clean_names(names))
    found = ids.str.fullmatch(re.escape(ORGANISMS[organism].gene_id_prefix) + r"\d{11}")
    return found if gene_map is None else found | ids.isin(gene_map.id_of_symbol)


def _proposal(
    asked: str,
    recognised: Mapping[str, int],
    obs: pd.DataFrame,
    organism: str,
    gene_map: GeneMap | None,
) -> str:
    """Advice if another location has more recognised genes than `asked`; else ""."""
    here, best = recognised.get(asked, 0), _best_place(recognised)
    if recognised[best] > here:
        column = "index" if best == "var_names" else best.removeprefix("var['").removesuffix("']")
        return f"{best} has {recognised[best]:,} genes, {asked} {here:,}: use it with gene_id: {column}"
    in_obs = int(_recognised(pd.Series(obs.index.astype(str), dtype=object), organism, gene_map).sum())
    if in_obs > 2 * here:
        return f"obs_names has {in_obs:,} genes: rows and columns are exchanged; give the cells as rows (adata.T)"
    return ""


def _attributes(var: pd.DataFrame, names_from: str) -> pd.DataFrame:
    """Var with the gene columns of the Census; if a column has the ids, the index is used as symbols."""
    if "feature_type" in var and holds_kinds(var["feature_type"]):  # e.g. "Gene Expression"; the Census has biotypes
        var = var.drop(columns="feature_type")
    if names_from == "var_names" or "feature_name" in var or var.index.astype(str).str.isdigit().any():
        return var
    return var.assign(feature_name=clean_names(pd.Series(var.index.astype(str), dtype=object)).to_numpy())


def _datasets(
    table: pd.DataFrame, path: Path, dataset_id: str | None, column: str | None
) -> list[tuple[str, npt.NDArray[Any]]]:
    """(dataset_id, rows of the file) of each dataset."""
    if column is None:
        return [(dataset_id or path.stem, np.arange(len(table)))]
    values = table_column(table, column, f"{path}: obs")
    if values.isna().any():
        raise UserError(f"{path}: {int(values.isna().sum()):,} cells have no {column}; every cell needs a dataset")
    codes, names = pd.factorize(values.map(label_text))
    return [(str(name), np.flatnonzero(codes == code)) for code, name in enumerate(names)]
