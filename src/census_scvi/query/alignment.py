"""A user's genes as a model's: matched by name alone, reported, and refused where too few fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.census.build.gene_ids import strip_version
from census_scvi.errors import UserError
from census_scvi.query.cells import QueryCells

_ENSEMBL = r"^(ENS[A-Z]*G)\d{11}"
_ABSENT = -1


@dataclass
class AlignmentReport:
    """What became of a query's genes and cells.

    Attributes
    ----------
    counts
        Where the raw counts were: `X`, `raw` or `layers/<name>`.
    names
        Where the names were: `var_names`, or a column of var.
    n_genes, n_shared
        Genes of the model, and of these in the query.
    by_id, by_symbol
        Columns of the query that were matched, by Ensembl id or by symbol.
    summed
        Of these, columns added to another one of the same gene.
    ambiguous
        Columns left out: their symbol stands for several genes.
    extra
        Columns of the query that the model does not use.
    missing
        Genes of the model that the query has not; they count as 0.
    n_cells, n_empty
        Cells read so far, and of these without any count in the model's genes.
    counts_share
        Share of the counts read so far that lie in genes of the model.
    """

    counts: str
    names: str
    n_genes: int
    n_shared: int
    by_id: int
    by_symbol: int
    summed: int
    ambiguous: int
    extra: int
    missing: list[str] = field(repr=False)
    n_cells: int = 0
    n_empty: int = 0
    counts_share: float = float("nan")

    @property
    def share(self) -> float:
        """Share of the model's genes that the query has."""
        return self.n_shared / self.n_genes

    def __str__(self) -> str:
        matched = {"Ensembl id": self.by_id, "symbol": self.by_symbol}
        lines = [
            f"raw counts from {self.counts}, genes from {self.names}",
            f"{self.n_shared:,} of the model's {self.n_genes:,} genes ({self.share:.1%}), by"
            f" {' and '.join(f'{name} ({n:,})' for name, n in matched.items() if n)}",
            f"{len(self.missing):,} genes are missing and count as 0; {self.extra:,} more of the query are not used",
        ]
        if self.summed:
            lines.append(f"{self.summed:,} columns were added to another one of the same gene")
        if self.ambiguous:
            lines.append(f"{self.ambiguous:,} columns were left out: their symbol stands for several genes")
        if self.n_cells:
            lines.append(f"{self.counts_share:.1%} of the counts of {self.n_cells:,} cells lie in the model's genes")
        if self.n_empty:
            lines.append(f"{self.n_empty:,} cells have no count in them: where they lie in the embedding means nothing")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"share": self.share}


class AlignedCells:
    """A query's raw counts in the genes of a model.

    Parameters
    ----------
    cells
        The query.
    genes
        feature_ids of the model, in the order of the columns.
    symbols
        Symbol of every gene that is known, by feature_id; the model's at least, where the query has symbols.
    organism
        Of the model, for messages.
    min_share
        Share of the model's genes that must be there.
    counts
        Where the raw counts are; None finds them.

    Attributes
    ----------
    report
        Grows while `blocks` is read.

    Raises
    ------
    UserError
        No raw counts, or too few of the model's genes: what was found where, and what is likely the matter.
    """

    def __init__(
        self,
        cells: QueryCells,
        genes: list[str],
        symbols: Mapping[str, str],
        organism: str,
        *,
        min_share: float,
        counts: str | None = None,
    ) -> None:
        self._cells = cells
        self._place = cells.find_counts(counts)
        known = _KnownGenes(genes, symbols)
        found = [_match(where, names, known) for where, names in _candidates(cells.var(self._place))]
        best = max(found, key=lambda match: match.n_shared)
        if best.n_shared < min_share * len(genes):
            raise UserError(_refusal(cells, self._place, best, found, known, organism, min_share))
        used = best.columns != _ABSENT
        self.report = AlignmentReport(
            counts=self._place,
            names=best.where,
            n_genes=len(genes),
            n_shared=best.n_shared,
            by_id=int((used & ~best.by_symbol).sum()),
            by_symbol=int((used & best.by_symbol).sum()),
            summed=int(used.sum()) - best.n_shared,
            ambiguous=best.ambiguous,
            extra=int((~used).sum()) - best.ambiguous,
            missing=best.missing(genes),
        )
        rows = np.flatnonzero(used)
        # float64, so that sums are exact before they are narrowed.
        self._selection = sp.csr_matrix((np.ones(len(rows)), (rows, best.columns[rows])), shape=(len(used), len(genes)))
        self._total = self._covered = 0.0

    def __len__(self) -> int:
        return len(self._cells)

    @property
    def obs(self) -> pd.DataFrame:
        """Obs of the query."""
        return self._cells.obs

    def blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """First row and raw counts, CSR float32 (cells, genes of the model), of at most `rows` cells at a time.

        Raises
        ------
        UserError
            A value is no raw count.
        """
        self.report.n_cells = self.report.n_empty = 0
        self._total = self._covered = 0.0
        for start, block in self._cells.blocks(self._place, rows):
            aligned = (block @ self._selection).astype(np.float32)
            aligned.sort_indices()
            aligned.eliminate_zeros()
            self._note(block, aligned)
            yield start, aligned

    def _note(self, block: sp.csr_matrix, aligned: sp.csr_matrix) -> None:
        self._total += float(block.sum(dtype=np.float64))
        self._covered += float(aligned.sum(dtype=np.float64))
        self.report.n_cells += aligned.shape[0]
        self.report.n_empty += int((np.diff(aligned.indptr) == 0).sum())
        self.report.counts_share = self._covered / self._total if self._total else float("nan")


class _KnownGenes:
    """Where a gene of some name lies among the model's; symbols that stand for several genes are apart."""

    def __init__(self, genes: list[str], symbols: Mapping[str, str]) -> None:
        self.genes = genes
        self.column = {gene: number for number, gene in enumerate(genes)}
        named = pd.Series(dict(symbols), dtype=object)
        named = named[named.notna() & (named != "") & (named.astype(str) != named.index)]
        several = named.duplicated(keep=False)
        self.several = set(named[several & named.index.isin(self.column)])
        self.id_of_symbol = {symbol: gene for gene, symbol in named[~several].items()}


@dataclass
class _Match:
    """Which columns of a query are which genes, by the names of one place."""

    where: str
    names: pd.Series
    columns: npt.NDArray[np.int64]
    by_symbol: npt.NDArray[np.bool_]
    ambiguous: int
    n_shared: int

    def missing(self, genes: list[str]) -> list[str]:
        """The genes that no column is."""
        there = set(self.columns.tolist())
        return [gene for number, gene in enumerate(genes) if number not in there]


def _candidates(var: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """Where names of genes may be: the index, and every column of text."""
    yield "var_names", pd.Series(var.index.astype(str))
    for column in var.columns:
        if not pd.api.types.is_numeric_dtype(var[column]):  # bool is numeric, too
            values = var[column].astype(object)
            yield f"var[{column!r}]", values.where(values.notna(), "").astype(str).reset_index(drop=True)


def _match(where: str, names: pd.Series, known: _KnownGenes) -> _Match:
    ids = strip_version(names)
    by_id = ids.isin(known.column)
    several = ~by_id & names.isin(known.several)
    resolved = ids.where(by_id, names.map(known.id_of_symbol))
    columns = resolved.map(known.column).fillna(_ABSENT).to_numpy().astype(np.int64)
    n_shared = len(np.unique(columns[columns != _ABSENT]))
    return _Match(where, names, columns, ~by_id.to_numpy(), int(several.sum()), n_shared)


def _refusal(
    cells: QueryCells,
    place: str,
    best: _Match,
    found: list[_Match],
    known: _KnownGenes,
    organism: str,
    min_share: float,
) -> str:
    """Why the genes do not fit, and what to do."""
    n_genes = len(known.genes)
    words = (
        f"{cells.name} has {best.n_shared:,} of the model's {n_genes:,} genes ({best.n_shared / n_genes:.1%}),"
        f" {min_share:.0%} are needed (genes.min_share); looked for Ensembl ids and symbols in"
        f" {', '.join(f'{match.where} (such as {match.names.iloc[0]!r}: {match.n_shared:,})' for match in found)}"
    )
    return f"{words}. {_hint(cells, place, best, found, known, organism)}"


def _hint(cells: QueryCells, place: str, best: _Match, found: list[_Match], known: _KnownGenes, organism: str) -> str:
    own = re.match(_ENSEMBL, known.genes[0])
    for match in found:
        prefixes = match.names.str.extract(_ENSEMBL)[0]
        others = prefixes[prefixes.notna() & (prefixes != (own and own[1]))]
        if len(others) > len(match.names) / 2:
            return (
                f"{match.where} holds Ensembl ids of another organism ({others.mode()[0]}...), the model is of"
                f" {organism} ({own and own[1]}...): take a model of that organism"
            )
    folded = {symbol.casefold() for symbol in (*known.id_of_symbol, *known.genes)}
    for match in found:
        alike = int(match.names.str.casefold().isin(folded).sum())
        if alike > max(2 * best.n_shared, len(match.names) // 5):
            return (
                f"{alike:,} names in {match.where} are the model's but for capitals ({match.names.iloc[0]!r}; the model"
                f" has {next(iter(known.id_of_symbol), known.genes[0])!r}). Human and mouse genes differ in that, and"
                f" the model is of {organism}: where the query is, too, write its names as the model does"
            )
    if not known.id_of_symbol:
        return "This model knows no symbols: give Ensembl ids, in var_names or in a column of var"
    if place != "raw" and len(cells.var("raw")) > len(cells.var(place)):
        return (
            f"{place} has {len(cells.var(place)):,} genes, .raw {len(cells.var('raw')):,}: were genes taken out? Map"
            " the cells as they were before, with raw counts of all genes"
        )
    if best.n_shared:
        return (
            "Missing are "
            + _listed(best.missing(known.genes))
            + ". Were genes taken out, such as all but variable ones? Map the cells as they were before"
        )
    return f"The model's genes are named like {known.genes[0]!r} or {next(iter(known.id_of_symbol))!r}"


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
