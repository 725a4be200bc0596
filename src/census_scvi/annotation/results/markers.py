"""Marker genes of cell types, and genes that separate two types, from the counts of a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scanpy as sc
import scipy.sparse as sp

from census_scvi.neighbors.log_pca import log_normalized

_FEWEST_CELLS, _MOST_CELLS, _RANKED = 3, 300, 50


@dataclass(frozen=True)
class Dots:
    """Expression of genes in groups of cells, float64 (groups, genes) each; NaN for a group without cells.

    Attributes
    ----------
    share
        Share of the cells with a count of the gene.
    mean
        Mean of log1p(counts per 10,000).
    """

    share: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]


class Markers:
    """Compares the types of a reference; of a type with more than 300 cells, 300 are drawn.

    Parameters
    ----------
    counts
        CSR (cells, genes): raw counts of the reference.
    labels
        (cells,): type of each cell. Types with fewer than three cells have no markers.
    seed
        Seed of the drawn cells.
    """

    def __init__(self, counts: sp.csr_matrix, labels: npt.ArrayLike, *, seed: int = 0) -> None:
        names = pd.Series(np.asarray(labels, dtype=object).astype(str))
        shuffled = names.sample(frac=1, random_state=seed)
        rows = np.sort(shuffled.groupby(shuffled).head(_MOST_CELLS).index.to_numpy())
        kept = names.iloc[rows]
        rows = rows[kept.groupby(kept).transform("size").to_numpy() >= _FEWEST_CELLS]
        logged = log_normalized(sp.csr_matrix(counts[rows], dtype=np.float32))
        obs = pd.DataFrame({"type": pd.Categorical(names.iloc[rows])}, index=[str(row) for row in rows])
        self._cells = ad.AnnData(logged, obs=obs)
        self.types = [str(name) for name in self._cells.obs["type"].cat.categories]

    def of_types(self, n_genes: int = 3) -> dict[str, list[int]]:
        """Columns of the marker genes of each type, the best first: higher in the type than in all others together.

        No gene is a marker of two types; the types choose in turn, so that each has its best gene if possible. Empty if
        there are fewer than two types.
        """
        if len(self.types) < 2:
            return {name: [] for name in self.types}
        ranked = self._higher("all", "rest")
        found: dict[str, list[int]] = {name: [] for name in self.types}
        taken: set[int] = set()
        for _ in range(n_genes):
            for name in self.types:
                gene = next((gene for gene in ranked[name] if gene not in taken), None)
                if gene is not None:
                    found[name].append(gene)
                    taken.add(gene)
        return found

    def between(self, first: str, second: str, n_genes: int = 4) -> tuple[list[int], list[int]]:
        """Columns of the genes that are higher in the first type than in the second, and the reverse, best first.

        Empty if one of the types has too few cells.
        """
        if first not in self.types or second not in self.types:
            return [], []
        higher = [self._higher([name], other)[name] for name, other in ((first, second), (second, first))]
        return higher[0][:n_genes], higher[1][:n_genes]

    def mean(self, genes: Sequence[int], types: Sequence[str]) -> npt.NDArray[np.float64]:
        """Mean of log1p(counts per 10,000) of some genes in some types, float64 (types, genes)."""
        cells = self._cells
        return np.vstack(
            [np.asarray(cells.X[np.flatnonzero(cells.obs["type"] == name)][:, genes].mean(axis=0)) for name in types]
        )

    def _higher(self, groups: str | list[str], other: str) -> dict[str, list[int]]:
        """Columns of the genes with a higher mean in each type than in `other`, by the t-test of scanpy."""
        sc.tl.rank_genes_groups(
            self._cells, "type", groups=groups, reference=other, method="t-test_overestim_var", n_genes=_RANKED
        )
        found = self._cells.uns["rank_genes_groups"]
        return {
            name: [
                int(gene) for gene, score in zip(found["names"][name], found["scores"][name], strict=True) if score > 0
            ]
            for name in found["names"].dtype.names
        }


def dots(counts: sp.csr_matrix, groups: npt.ArrayLike, names: Sequence[str], genes: Sequence[int]) -> Dots:
    """Expression of some genes in groups of cells.

    Parameters
    ----------
    counts
        CSR (cells, genes): raw counts.
    groups
        (cells,): group of each cell.
    names
        Groups of the result, in order.
    genes
        Columns of the genes.
    """
    codes = pd.Categorical(np.asarray(groups, dtype=object).astype(str), categories=list(names)).codes
    some = sp.csr_matrix(log_normalized(sp.csr_matrix(counts, dtype=np.float32))[:, list(genes)])
    one_hot = sp.csr_matrix((codes == np.arange(len(names))[:, None]).astype(np.float64))
    cells = np.asarray(one_hot.sum(axis=1))
    with np.errstate(invalid="ignore"):
        return Dots((one_hot @ (some > 0)).toarray() / cells, (one_hot @ some).toarray() / cells)
