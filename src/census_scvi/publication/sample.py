"""Independent check of an embedding: cells are read again with the Census API and embedded with scvi-tools alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import anndata as ad
import cellxgene_census
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import scvi

from census_scvi.census.cells import Cells
from census_scvi.census.open import Census
from census_scvi.config.random_streams import Stream, draw, generator
from census_scvi.model.encode import reference_latent


@dataclass(frozen=True)
class Sample:
    """A sample of the cells of a Census.

    Attributes
    ----------
    rows
        int64 (cells,): positions among the cells of the query, ascending.
    joinids
        int64 (cells,): soma_joinids.
    counts
        CSR float32 (cells, genes): raw counts in the model's genes, in the model's order.
    obs
        All obs columns, and `batch`.
    """

    rows: npt.NDArray[np.int64]
    joinids: npt.NDArray[np.int64]
    counts: sp.csr_matrix
    obs: pd.DataFrame

    def embed(
        self, model: scvi.model.SCVI, genes: list[str]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Posterior means and variances by scvi-tools' `load_query_data`, float32 (cells, n_latent) each."""
        return reference_latent(model, genes, self.counts, self.obs["batch"].to_numpy(dtype=object))


def draw_rows(n_cells: int, size: int, seed: int) -> npt.NDArray[np.int64]:
    """Random positions among cells, ascending."""
    return draw(n_cells, size, generator(seed, Stream.GATE_CELLS))


def read_sample(
    census: Census, cells: Cells, rows: npt.NDArray[np.int64], genes: list[str], gene_joinids: npt.NDArray[np.int64]
) -> Sample:
    """Read cells with `cellxgene_census.get_anndata`.

    Parameters
    ----------
    census
        The open Census.
    cells
        The cells of the query.
    rows
        int64 (cells,): positions among these cells, ascending.
    genes
        feature_ids of the model's genes.
    gene_joinids
        int64 (genes,): their soma_joinids, -1 for a gene that the Census lacks; its counts are 0.
    """
    joinids = cells.joinids[rows]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transforming to str index")
        found = cellxgene_census.get_anndata(
            census.root,
            census.identity["organism"],
            obs_coords=joinids.tolist(),
            var_coords=np.sort(gene_joinids[gene_joinids >= 0]).tolist(),
        )
    order = pd.Index(found.obs["soma_joinid"]).get_indexer(joinids)
    found = found[order]
    labels = np.array(cells.batches, dtype=object)[cells.batch_codes[rows]]
    return Sample(rows, joinids, _in_order(found, genes), found.obs.assign(batch=labels).reset_index(drop=True))


def _in_order(found: ad.AnnData, genes: list[str]) -> sp.csr_matrix:
    """Counts in the model's genes and order, by a sparse matrix product."""
    places = pd.Index(genes).get_indexer(found.var["feature_id"].astype(str))
    shape = (found.n_vars, len(genes))
    selection = sp.csr_matrix((np.ones(found.n_vars, np.float32), (np.arange(found.n_vars), places)), shape=shape)
    counts = sp.csr_matrix(found.X).astype(np.float32) @ selection
    counts.sort_indices()
    return counts
