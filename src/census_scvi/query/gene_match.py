"""Match the columns of a query with the genes of a model, by names from one place of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.census.gene_ids import strip_version
from census_scvi.census.gene_rows import clean_names, named_twice

ABSENT = -1


class KnownGenes:
    """A model's genes by id (`column`) and by symbol (`id_of_symbol`); `several`: symbols that several genes share."""

    def __init__(self, genes: list[str], symbols: Mapping[str, str]) -> None:
        self.genes = genes
        self.column = {gene: number for number, gene in enumerate(genes)}
        named = pd.Series(dict(symbols), dtype=object)
        named = named[named.notna() & (named != "") & (named.astype(str) != named.index)]
        several = named.duplicated(keep=False)
        self.several = set(named[several & named.index.isin(self.column)])
        self.id_of_symbol = {symbol: gene for gene, symbol in named[~several].items()}


@dataclass
class Match:
    """Columns of a query and the genes of the model that they match.

    Attributes
    ----------
    where
        Place of the names: `var_names`, or a column of var.
    names
        Cleaned names of all columns (`clean_names`).
    shown
        The first name as in the file, for messages.
    columns
        int64 (columns of the query,): column of the model, or `ABSENT`.
    by_symbol
        bool (columns of the query,): the column was not matched by id.
    ambiguous
        Number of columns with a symbol that several genes share.
    twice
        Number of columns that are not used, because their symbol is that of a gene that another column has by id
        (`named_twice`).
    n_shared
        Number of the model's genes that the query has.
    """

    where: str
    names: pd.Series
    shown: str
    columns: npt.NDArray[np.int64]
    by_symbol: npt.NDArray[np.bool_]
    ambiguous: int
    twice: int
    n_shared: int

    @property
    def used(self) -> npt.NDArray[np.bool_]:
        """Whether each column of the query matches a gene of the model, bool (columns of the query,)."""
        return self.columns != ABSENT

    def missing(self, genes: list[str]) -> list[str]:
        """Genes of the model that no column matches."""
        found = set(self.columns.tolist())
        return [gene for number, gene in enumerate(genes) if number not in found]

    def selection(self, n_genes: int) -> sp.csr_matrix:
        """CSR float64 (columns of the query, genes) of 0 and 1; float64 keeps sums exact before the cast to float32."""
        rows = np.flatnonzero(self.used)
        return sp.csr_matrix((np.ones(len(rows)), (rows, self.columns[rows])), shape=(len(self.columns), n_genes))


def match_names(where: str, names: pd.Series, is_gene: npt.NDArray[np.bool_], known: KnownGenes) -> Match:
    """Match the names of a query's columns with a model's genes.

    Parameters
    ----------
    where
        Place of the names, for messages.
    names
        Name of each column of the query: Ensembl id, symbol or something else.
    is_gene
        bool (columns of the query,): columns that are genes; others are not matched.
    known
        The model's genes.
    """
    cleaned = clean_names(names)
    ids = strip_version(cleaned)
    by_id = ids.isin(known.column)
    several = ~by_id & cleaned.isin(known.several) & is_gene
    by_symbol = cleaned.map(known.id_of_symbol)
    columns = ids.where(by_id, by_symbol).map(known.column).fillna(ABSENT).to_numpy().astype(np.int64)
    twice = np.zeros(len(ids), bool)
    twice[is_gene] = named_twice(ids[is_gene], by_symbol[is_gene])
    columns[~is_gene | twice] = ABSENT
    n_shared = len(np.unique(columns[columns != ABSENT]))
    shown = str(names.iloc[0]) if len(names) else ""
    return Match(where, cleaned, shown, columns, ~by_id.to_numpy(), int(several.sum()), int(twice.sum()), n_shared)
