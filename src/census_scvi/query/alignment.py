"""A user's counts for the genes of a model: matched by name, with a report, and an error if too few genes match."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.census.gene_rows import NAMED_TWICE, GeneRows, find_gene_rows, left_out_words, name_columns
from census_scvi.census.schema import PRIMATES
from census_scvi.query.cells import QueryCells
from census_scvi.query.gene_match import KnownGenes, Match, match_names
from census_scvi.query.protein_alignment import AlignedProteins
from census_scvi.query.too_few_genes import Refusal, TooFewGenes, enough_counts, listed

log = logging.getLogger(__name__)

# Symbols in capitals are those of this organism unless something else is said.
_USUAL = "homo_sapiens"


@dataclass
class AlignmentReport:
    """Report on a query's genes and cells.

    Attributes
    ----------
    counts
        Place of the raw counts: `X`, `raw` or `layers/<name>`.
    names
        Place of the gene names: `var_names`, or a column of var.
    n_genes, n_shared
        Number of the model's genes, and number of these in the query.
    by_id, by_symbol
        Number of columns of the query matched by Ensembl id, and by symbol.
    summed
        Number of matched columns that were added to another column of the same gene.
    ambiguous
        Number of ignored columns with a symbol that several genes share.
    extra
        Number of other columns of genes that the model does not use.
    not_genes
        Number of ignored columns of each kind: proteins, guides, hashtags, peaks, spike-ins, another genome, and
        symbols of a gene that another column has by id.
    missing
        Genes of the model that the query does not have; they count as 0.
    expected_share
        Share of the expected counts of such cells in genes that the query has; NaN if there is no estimate.
    n_cells, n_empty
        Number of cells read so far, and number of these without counts in the model's genes.
    counts_share
        Share of the counts read so far in genes of the model; NaN if there are no counts.
    undecided
        The model's organism, if it is a primate other than human and all genes were matched by symbols, which most
        primates share; else "".
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
    undecided: str = ""

    @classmethod
    def of(
        cls, place: str, match: Match, rows: GeneRows, genes: list[str], expected_share: float, organism: str
    ) -> Self:
        """The report before any cell is read."""
        used = match.used
        by_symbol_alone = bool(match.by_symbol[used].all())
        return cls(
            counts=place,
            names=match.where,
            n_genes=len(genes),
            n_shared=match.n_shared,
            by_id=int((used & ~match.by_symbol).sum()),
            by_symbol=int((used & match.by_symbol).sum()),
            summed=int(used.sum()) - match.n_shared,
            ambiguous=match.ambiguous,
            extra=int((~used & rows.is_gene).sum()) - match.ambiguous - match.twice,
            missing=match.missing(genes),
            not_genes=rows.left_out | ({NAMED_TWICE: match.twice} if match.twice else {}),
            expected_share=expected_share,
            undecided=organism if organism in PRIMATES and organism != _USUAL and by_symbol_alone else "",
        )

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
            lines.append(f"{self.summed:,} columns were summed with another one of the same gene")
        if self.ambiguous:
            lines.append(f"{self.ambiguous:,} columns were ignored: their symbol is that of several genes")
        if self.undecided:
            lines.append(
                f"the cells are taken for those of {self.undecided}: most symbols are the same in all primates, so only"
                " Ensembl ids would show another one"
            )
        if self.n_cells:
            lines.append(f"{self.counts_share:.1%} of the counts of {self.n_cells:,} cells are in the model's genes")
        if self.n_empty:
            lines.append(
                f"{self.n_empty:,} cells have no counts in these genes: their position in the embedding is meaningless"
            )
        return "\n".join(lines)

    def _expected(self) -> str:
        if np.isnan(self.expected_share) or not self.missing:
            return ""
        return f", with {1 - self.expected_share:.1%} of the counts expected in these cells"

    def as_dict(self) -> dict[str, Any]:
        """All attributes and `share`, for JSON."""
        return asdict(self) | {"share": self.share}


class AlignedCells:
    """A query's raw counts for the genes of a model.

    Parameters
    ----------
    cells
        The query.
    genes
        feature_ids of the model, in the order of the columns.
    symbols
        Symbols of genes by feature_id. To match symbols, those of the model's genes are needed.
    organism
        Organism of the model.
    min_share
        Required share of the model's genes. A smaller share is sufficient if at most (1 - `min_share`) / 2 of the
        counts are expected in the missing genes, for example in a table without genes that no cell expresses.
    counts
        Place of the raw counts; None: search all places.
    expected
        Function of raw counts of some cells (model's genes) and of the genes that the query has, bool (genes,). It
        returns the share of the expected counts in these genes (`ExpectedCounts.share`).
    owner
        What the genes are of, for messages: model or reference.
    protein_names
        Proteins of the model, in the order of the columns; empty for a model without proteins.
    proteins
        Place of the proteins: `obsm/<name>`, `features`, or `none` for a query without proteins; None: found.

    Attributes
    ----------
    report
        Report on the genes and cells; `blocks` updates the numbers of cells and counts.
    proteins
        The query's proteins, of the model; None for a model without proteins.

    Raises
    ------
    UserError
        There are no raw counts, or no proteins for a model with proteins (`AlignedProteins.find`).
    TooFewGenes
        The query has too few of the model's genes; the message has the matches in each place and the likely reason.
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
        owner: str = "model",
        protein_names: Sequence[str] = (),
        proteins: str | None = None,
    ) -> None:
        self._cells, self._genes = cells, genes
        self._place = cells.find_counts(counts)
        known = KnownGenes(genes, symbols)
        var = cells.var(self._place)
        rows = find_gene_rows(var, organism)
        found = [match_names(where, names, rows.is_gene, known) for where, names in name_columns(var)]
        best = max(found, key=lambda match: match.n_shared)
        self._selection = best.selection(len(genes))
        expected_share = self._expected_share(best, expected)
        if best.n_shared < min_share * len(genes) and not expected_share >= enough_counts(min_share):
            raise TooFewGenes(
                Refusal(cells, self._place, rows, best, found, known, organism, min_share, expected_share, owner)
            )
        self.report = AlignmentReport.of(self._place, best, rows, genes, expected_share, organism)
        if expected_share < min_share:
            log.warning(
                "the missing genes hold %.0f%% of the expected counts of the query's cells: %s",
                100 * (1 - expected_share),
                listed(self.report.missing),
            )
        self._total = self._covered = 0.0
        self.proteins = AlignedProteins.find(cells, self._place, protein_names, proteins) if protein_names else None

    def _expected_share(
        self, best: Match, expected: Callable[[sp.csr_matrix, npt.NDArray[np.bool_]], float] | None
    ) -> float:
        """Share of the expected counts in genes that the query has; NaN if there is no estimate."""
        if expected is None or not best.n_shared:
            return float("nan")
        aligned = self._aligned(self._cells.sample(self._place))
        aligned = aligned[np.diff(aligned.indptr) > 0]
        if not aligned.shape[0]:
            return float("nan")
        there = np.zeros(aligned.shape[1], bool)
        there[best.columns[best.used]] = True
        return expected(aligned, there)

    def _aligned(self, block: sp.csr_matrix) -> sp.csr_matrix:
        aligned = (block @ self._selection).astype(np.float32)
        aligned.sort_indices()
        aligned.eliminate_zeros()
        return aligned

    def __len__(self) -> int:
        return len(self._cells)

    @property
    def name(self) -> str:
        """Name of the query's file, without its folder."""
        return Path(self._cells.name).name

    @property
    def place(self) -> str:
        """Place of the raw counts."""
        return self._place

    @property
    def selection(self) -> sp.csr_matrix:
        """CSR float64 (columns of the place, genes of the model) of 0 and 1: what is summed for each gene."""
        return self._selection

    @property
    def shared(self) -> npt.NDArray[np.int64]:
        """Positions of the genes that the query has, ascending."""
        missing = set(self.report.missing)
        return np.flatnonzero([gene not in missing for gene in self._genes])

    @property
    def obs(self) -> pd.DataFrame:
        """The query's obs."""
        return self._cells.obs

    def blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Blocks of at most `rows` cells: first row, and raw counts, CSR float32 (cells, genes of the model).

        Raises
        ------
        UserError
            A value is not a raw count.
        """
        self.report.n_cells = self.report.n_empty = 0
        self._total = self._covered = 0.0
        for start, block in self._cells.blocks(self._place, rows):
            aligned = self._aligned(block)
            self._note(block, aligned)
            yield start, aligned

    def blocks_with_proteins(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix, npt.NDArray[np.float32] | None]]:
        """Blocks as in `blocks`, with the raw protein counts, float32 (cells, proteins of the model).

        They are None for a model without proteins.
        """
        following = None if self.proteins is None else self.proteins.reader(rows)
        for start, counts in self.blocks(rows):
            yield start, counts, None if following is None else following(counts.shape[0])

    def _note(self, block: sp.csr_matrix, aligned: sp.csr_matrix) -> None:
        self._total += float(block.sum(dtype=np.float64))
        self._covered += float(aligned.sum(dtype=np.float64))
        self.report.n_cells += aligned.shape[0]
        self.report.n_empty += int((np.diff(aligned.indptr) == 0).sum())
        self.report.counts_share = self._covered / self._total if self._total else float("nan")
