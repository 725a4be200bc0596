"""A user's genes as a model's: matched by name alone, reported, and refused where too few fit."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.census.build.gene_ids import strip_version
from census_scvi.census.build.gene_rows import (
    NAMED_TWICE,
    GeneRows,
    clean_names,
    find_gene_rows,
    left_out_words,
    name_columns,
    named_twice,
)
from census_scvi.errors import UserError
from census_scvi.query.cells import QueryCells

log = logging.getLogger(__name__)

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
    not_genes
        Columns left out because they are no genes of the organism: proteins, guides, hashtags, peaks, spike-ins,
        another genome; how many of each.
    missing
        Genes of the model that the query has not; they count as 0.
    expected_share
        Share of the counts expected in such cells that lies in genes which the query has; NaN where none are expected.
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
    not_genes: dict[str, int] = field(default_factory=dict)
    expected_share: float = float("nan")
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
            f"{len(self.missing):,} genes are missing and count as 0{self._expected()}; {self.extra:,} more of the"
            " query are not used",
        ]
        if self.not_genes:
            lines.append(left_out_words(self.not_genes))
        if self.summed:
            lines.append(f"{self.summed:,} columns were added to another one of the same gene")
        if self.ambiguous:
            lines.append(f"{self.ambiguous:,} columns were left out: their symbol stands for several genes")
        if self.n_cells:
            lines.append(f"{self.counts_share:.1%} of the counts of {self.n_cells:,} cells lie in the model's genes")
        if self.n_empty:
            lines.append(f"{self.n_empty:,} cells have no count in them: where they lie in the embedding means nothing")
        return "\n".join(lines)

    def _expected(self) -> str:
        if np.isnan(self.expected_share) or not self.missing:
            return ""
        return f", with {1 - self.expected_share:.1%} of the counts expected in these cells"

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
        Share of the model's genes that must be there. Fewer will do where hardly any counts are expected in those that
        are not, as in a table without the genes that no cell had: half of what `min_share` lets miss.
    counts
        Where the raw counts are; None finds them.
    expected
        From counts of some cells in the model's genes, and which genes there are, to the share of the counts expected
        in such cells that lies in these genes (`ExpectedCounts.share`).

    Attributes
    ----------
    report
        Grows while `blocks` is read.

    Raises
    ------
    UserError
        No raw counts.
    TooFewGenes
        Too few of the model's genes: what was found where, and what is likely the matter.
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
        expected: Callable[[sp.csr_matrix, npt.NDArray[np.bool_]], float] | None = None,
    ) -> None:
        self._cells = cells
        self._place = cells.find_counts(counts)
        known = _KnownGenes(genes, symbols)
        var = cells.var(self._place)
        rows = find_gene_rows(var, organism)
        found = [_match(where, names, rows.is_gene, known) for where, names in name_columns(var)]
        best = max(found, key=lambda match: match.n_shared)
        self._selection = best.selection(len(genes))
        expected_share = self._expected_share(best, expected)
        if best.n_shared < min_share * len(genes) and not expected_share >= _enough_counts(min_share):
            raise TooFewGenes(
                _Refusal(cells, self._place, rows, best, found, known, organism), min_share, expected_share
            )
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
            extra=int((~used & rows.is_gene).sum()) - best.ambiguous - best.twice,
            missing=best.missing(genes),
            not_genes=rows.left_out | ({NAMED_TWICE: best.twice} if best.twice else {}),
            expected_share=expected_share,
        )
        if expected_share < min_share:
            log.warning(
                "the genes that the query lacks hold %.0f%% of the counts expected in its cells: %s",
                100 * (1 - expected_share),
                _listed(self.report.missing),
            )
        self._total = self._covered = 0.0

    def _expected_share(
        self, best: _Match, expected: Callable[[sp.csr_matrix, npt.NDArray[np.bool_]], float] | None
    ) -> float:
        """Share of the expected counts in genes that the query has."""
        if expected is None or not best.n_shared:
            return float("nan")
        aligned = self._aligned(self._cells.sample(self._place))
        aligned = aligned[np.diff(aligned.indptr) > 0]
        if not aligned.shape[0]:
            return float("nan")
        there = np.zeros(aligned.shape[1], bool)
        there[best.columns[best.columns != _ABSENT]] = True
        return expected(aligned, there)

    def _aligned(self, block: sp.csr_matrix) -> sp.csr_matrix:
        aligned = (block @ self._selection).astype(np.float32)
        aligned.sort_indices()
        aligned.eliminate_zeros()
        return aligned

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
            aligned = self._aligned(block)
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
    shown: str
    columns: npt.NDArray[np.int64]
    by_symbol: npt.NDArray[np.bool_]
    ambiguous: int
    twice: int
    n_shared: int

    def missing(self, genes: list[str]) -> list[str]:
        """The genes that no column is."""
        there = set(self.columns.tolist())
        return [gene for number, gene in enumerate(genes) if number not in there]

    def selection(self, n_genes: int) -> sp.csr_matrix:
        """(columns of the query, genes): float64, so that sums are exact before they are narrowed."""
        rows = np.flatnonzero(self.columns != _ABSENT)
        return sp.csr_matrix((np.ones(len(rows)), (rows, self.columns[rows])), shape=(len(self.columns), n_genes))


def _match(where: str, names: pd.Series, is_gene: npt.NDArray[np.bool_], known: _KnownGenes) -> _Match:
    cleaned = clean_names(names)
    ids = strip_version(cleaned)
    by_id = ids.isin(known.column)
    several = ~by_id & cleaned.isin(known.several) & is_gene
    by_symbol = cleaned.map(known.id_of_symbol)
    columns = ids.where(by_id, by_symbol).map(known.column).fillna(_ABSENT).to_numpy().astype(np.int64)
    twice = np.zeros(len(ids), bool)
    twice[is_gene] = named_twice(ids[is_gene], by_symbol[is_gene])
    columns[~is_gene | twice] = _ABSENT
    n_shared = len(np.unique(columns[columns != _ABSENT]))
    shown = str(names.iloc[0]) if len(names) else ""
    return _Match(where, cleaned, shown, columns, ~by_id.to_numpy(), int(several.sum()), int(twice.sum()), n_shared)


def _enough_counts(min_share: float) -> float:
    """Share of the expected counts with which fewer genes than `min_share` will do."""
    return 1 - (1 - min_share) / 2


class TooFewGenes(UserError):
    """Too few of a model's genes are in a query; `named` says it with the caller's own name of `min_share`."""

    def __init__(self, refusal: _Refusal, min_share: float, expected_share: float, setting: str = "min_share=") -> None:
        self._arguments = (refusal, min_share, expected_share)
        super().__init__(refusal.words(min_share, expected_share, setting))

    def named(self, setting: str) -> TooFewGenes:
        """The same error with another name of the threshold."""
        return TooFewGenes(*self._arguments, setting=setting)


@dataclass(frozen=True)
class _Refusal:
    """Why the genes of a query do not fit, and what to do."""

    cells: QueryCells
    place: str
    rows: GeneRows
    best: _Match
    found: list[_Match]
    known: _KnownGenes
    organism: str

    def words(self, min_share: float, expected_share: float, setting: str) -> str:
        """All of it, in one line."""
        n_genes, best = len(self.known.genes), self.best
        of_counts = ""
        if not np.isnan(expected_share):
            of_counts = (
                f", or {_enough_counts(min_share):.0%} of the counts expected in these cells"
                f" ({expected_share:.1%} are in these genes)"
            )
        looked = ", ".join(f"{match.where} (such as {match.shown!r}: {match.n_shared:,})" for match in self.found)
        return (
            f"{self.cells.name} has {best.n_shared:,} of the model's {n_genes:,} genes ({best.n_shared / n_genes:.1%}),"
            f" {min_share:.0%} are needed ({setting}){of_counts}; looked for Ensembl ids and symbols in {looked}."
            f" {self._hint()}"
        )

    def _hint(self) -> str:
        ways = (
            self._no_genes, self._in_obs, self._other_ids, self._other_capitals, self._no_symbols, self._more_in_raw,
            self._some_missing,
        )  # fmt: skip
        known = self.known
        return next(
            (hint for way in ways if (hint := way())),
            f"The model's genes are named like {known.genes[0]!r} or {next(iter(known.id_of_symbol), '')!r}",
        )

    def _no_genes(self) -> str:
        if not self.rows.left_out or self.rows.is_gene.sum() > len(self.rows.is_gene) / 2:
            return ""
        return f"{self.rows} (the model is of {self.organism})"

    def _in_obs(self) -> str:
        """The genes are cells, and the cells genes."""
        names = pd.Series(self.cells.obs.index.astype(str), dtype=object)
        match = _match("obs_names", names, np.ones(len(names), bool), self.known)
        if match.n_shared < max(_SOME, 2 * self.best.n_shared):
            return ""
        return (
            f"{match.n_shared:,} of the model's genes are in obs_names: rows and columns are exchanged; give the cells"
            " as rows (adata.T)"
        )

    def _other_ids(self) -> str:
        own = re.match(_ENSEMBL, self.known.genes[0])
        for match in self.found:
            prefixes = match.names.str.extract(_ENSEMBL)[0]
            others = prefixes[prefixes.notna() & (prefixes != (own and own[1]))]
            if len(others) > len(match.names) / 2:
                return (
                    f"{match.where} holds Ensembl ids of another organism ({others.mode()[0]}...), the model is of"
                    f" {self.organism} ({own and own[1]}...): take a model of that organism"
                )
            if match.names.str.match(r"ENS[A-Z]*T\d{11}").mean() > 0.5:
                return f"{match.where} holds transcripts ({match.shown!r}): sum them by gene"
        return ""

    def _other_capitals(self) -> str:
        """Symbols that are the model's but for capitals, as an ortholog's are."""
        symbols = [*self.known.id_of_symbol]
        exact = {*symbols, *self.known.genes}
        folded = {name.casefold() for name in exact}
        for match in self.found:
            names = match.names[~match.names.str.match(r"ENS[A-Z]*G\d{11}")]
            alike = int(names[~names.isin(exact)].str.casefold().drop_duplicates().isin(folded).sum())
            few = max(_SOME, 2 * self.best.n_shared, min(len(names), len(folded)) // 5)
            styles = [_capitals(pd.Series(values, dtype=object)) for values in (names, symbols)]
            if len(names) >= 2 * _SOME and styles[0] and styles[1] and styles[0] != styles[1] and styles[0] != "lower":
                return (
                    f"{match.where} holds symbols of another organism: they are written as {_OF_STYLE[styles[0]]}"
                    f" ({match.shown!r}), and the model is of {self.organism}: take a model of that organism"
                )
            if alike >= few:
                return (
                    f"{alike:,} names in {match.where} are the model's but for capitals ({match.shown!r}; the model has"
                    f" {next(iter(symbols), self.known.genes[0])!r}). Genes of other organisms differ in that, and the"
                    f" model is of {self.organism}: where the query is, too, write its names as the model does"
                )
        return ""

    def _no_symbols(self) -> str:
        if self.known.id_of_symbol:
            return ""
        return "This model knows no symbols: give Ensembl ids, in var_names or in a column of var"

    def _more_in_raw(self) -> str:
        n_genes, n_raw = len(self.cells.var(self.place)), len(self.cells.var("raw"))
        if self.place == "raw" or n_raw <= n_genes:
            return ""
        return (
            f"{self.place} has {n_genes:,} genes, .raw {n_raw:,}: were genes taken out? Map the cells as they were"
            " before, with raw counts of all genes"
        )

    def _some_missing(self) -> str:
        if not self.best.n_shared:
            return ""
        missing = _listed(self.best.missing(self.known.genes))
        return (
            f"Missing are {missing}. Were genes taken out, such as all but variable ones? Map the cells as they were"
            " before"
        )


# Names alike from which on it is no accident.
_SOME = 10
_OF_STYLE = {"Upper": "those of human genes are", "Capital": "those of mouse and rat are"}


def _capitals(names: pd.Series) -> str:
    """How most symbols are written: `Upper` (TP53, human), `Capital` (Trp53, mouse), `lower`, or "" where mixed."""
    words = names[names.str.fullmatch(r"[A-Za-z][A-Za-z0-9.-]*[A-Za-z][A-Za-z0-9.-]*")]
    styles = {"Upper": r"[^a-z]+", "Capital": r"[A-Z][^A-Z]+", "lower": r"[^A-Z]+"}
    return next((name for name, form in styles.items() if len(words) and words.str.fullmatch(form).mean() > 0.6), "")


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
