"""The error for a query with too few of a model's genes: matches in each place, the likely reason, what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from census_scvi.census.gene_rows import GeneRows
from census_scvi.census.schema import ORGANISMS
from census_scvi.errors import UserError
from census_scvi.query.cells import QueryCells
from census_scvi.query.gene_match import KnownGenes, Match, match_names

_ENSEMBL = r"^(ENS[A-Z]*G)\d{11}"
# This number of matching names is not accidental.
_SOME = 10
_OF_STYLE = {"Upper": "human gene symbols are", "Capital": "mouse and rat gene symbols are"}


def enough_counts(min_share: float) -> float:
    """Share of the expected counts that is sufficient if a query has fewer genes than `min_share`."""
    return 1 - (1 - min_share) / 2


class TooFewGenes(UserError):
    """A query has too few of a model's genes; `named` gives the message with the caller's name of `min_share`."""

    def __init__(self, refusal: Refusal, setting: str = "min_share=") -> None:
        self._refusal = refusal
        super().__init__(refusal.words(setting))

    def named(self, setting: str) -> TooFewGenes:
        """The same error with another name of the setting `min_share`."""
        return TooFewGenes(self._refusal, setting)


@dataclass(frozen=True)
class Refusal:
    """Why a query has too few of the model's genes, and what to do."""

    cells: QueryCells
    place: str
    rows: GeneRows
    best: Match
    found: list[Match]
    known: KnownGenes
    organism: str
    min_share: float
    expected_share: float
    owner: str = "model"

    def words(self, setting: str) -> str:
        """The whole message, in one line."""
        n_genes, best = len(self.known.genes), self.best
        of_counts = ""
        if not np.isnan(self.expected_share):
            of_counts = (
                f", or {enough_counts(self.min_share):.0%} of the counts expected in these cells"
                f" ({self.expected_share:.1%} are in these genes)"
            )
        looked = ", ".join(f"{match.where} (such as {match.shown!r}: {match.n_shared:,})" for match in self.found)
        return (
            f"{self.cells.name} has {best.n_shared:,} of the {self.owner}'s {n_genes:,} genes"
            f" ({best.n_shared / n_genes:.1%}),"
            f" {self.min_share:.0%} are needed ({setting}){of_counts}; searched for Ensembl ids and symbols in"
            f" {looked}."
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
            f"The {self.owner}'s genes have names such as {known.genes[0]!r} or {next(iter(known.id_of_symbol), '')!r}",
        )

    def _no_genes(self) -> str:
        if not self.rows.left_out or self.rows.is_gene.sum() > len(self.rows.is_gene) / 2:
            return ""
        return f"{self.rows} (the {self.owner} is of {self.organism})"

    def _in_obs(self) -> str:
        """Rows and columns are exchanged: obs_names are genes."""
        names = pd.Series(self.cells.obs.index.astype(str), dtype=object)
        match = match_names("obs_names", names, np.ones(len(names), bool), self.known)
        if match.n_shared < max(_SOME, 2 * self.best.n_shared):
            return ""
        return (
            f"{match.n_shared:,} of the {self.owner}'s genes are in obs_names: rows and columns are exchanged; give"
            " the cells"
            " as rows (adata.T)"
        )

    def _other_ids(self) -> str:
        own = re.match(_ENSEMBL, self.known.genes[0])
        for match in self.found:
            prefixes = match.names.str.extract(_ENSEMBL)[0]
            others = prefixes[prefixes.notna() & (prefixes != (own and own[1]))]
            if own and len(others) > len(match.names) / 2:
                prefix = str(others.mode()[0])
                name = next((f", {key}" for key, other in ORGANISMS.items() if other.gene_id_prefix == prefix), "")
                return (
                    f"{match.where} holds Ensembl ids of another organism ({prefix}...{name}), the {self.owner}"
                    " is of"
                    f" {self.organism} ({own[1]}...): use a {self.owner} of that organism"
                )
            if match.names.str.match(r"ENS[A-Z]*T\d{11}").mean() > 0.5:
                return f"{match.where} holds transcripts ({match.shown!r}): sum them by gene"
        return ""

    def _other_capitals(self) -> str:
        """Symbols differ from the model's only in capitals, like those of orthologs."""
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
                    f" ({match.shown!r}), and the {self.owner} is of {self.organism}: use a {self.owner} of that"
                    " organism"
                )
            if alike >= few:
                return (
                    f"{alike:,} names in {match.where} differ from the {self.owner}'s only in capitals"
                    f" ({match.shown!r};"
                    f" the {self.owner} has"
                    f" {next(iter(symbols), self.known.genes[0])!r}). Gene names of other organisms differ in"
                    f" this way, and the {self.owner} is of {self.organism}: if the query is, too, write its names as"
                    " the"
                    f" {self.owner} does"
                )
        return ""

    def _no_symbols(self) -> str:
        if self.known.id_of_symbol:
            return ""
        return f"This {self.owner} has no symbols: give Ensembl ids in var_names or in a column of var"

    def _more_in_raw(self) -> str:
        n_genes, n_raw = len(self.cells.var(self.place)), len(self.cells.var("raw"))
        if self.place == "raw" or n_raw <= n_genes:
            return ""
        return (
            f"{self.place} has {n_genes:,} genes, .raw {n_raw:,}: were genes removed? Use the original file,"
            " with raw counts of all genes"
        )

    def _some_missing(self) -> str:
        if not self.best.n_shared:
            return ""
        missing = listed(self.best.missing(self.known.genes))
        return (
            f"Missing are {missing}. Were genes removed, for example all but the variable ones? Use the original file,"
            " with all genes"
        )


def _capitals(names: pd.Series) -> str:
    """Style of most symbols: `Upper` (TP53, human), `Capital` (Trp53, mouse), `lower`, or "" if they are mixed."""
    words = names[names.str.fullmatch(r"[A-Za-z][A-Za-z0-9.-]*[A-Za-z][A-Za-z0-9.-]*")]
    styles = {"Upper": r"[^a-z]+", "Capital": r"[A-Z][^A-Z]+", "lower": r"[^A-Z]+"}
    return next((name for name, form in styles.items() if len(words) and words.str.fullmatch(form).mean() > 0.6), "")


def listed(names: list[str], most: int = 5) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
