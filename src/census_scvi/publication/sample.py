"""Independent check of an embedding: cells are read again with the Census API and embedded with scvi-tools alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

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
    proteins
        float32 (cells, proteins): raw counts of the model's proteins, in the model's order; None without proteins.
    """

    rows: npt.NDArray[np.int64]
    joinids: npt.NDArray[np.int64]
    counts: sp.csr_matrix
    obs: pd.DataFrame
    proteins: npt.NDArray[np.float32] | None = None

    def embed(
        self, model: scvi.model.SCVI, genes: list[str]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Posterior means and variances by scvi-tools' `load_query_data`, float32 (cells, n_latent) each."""
        batches = self.obs["batch"].to_numpy(dtype=object)
        return reference_latent(model, genes, self.counts, batches, self.proteins)


def draw_rows(n_cells: int, size: int, seed: int) -> npt.NDArray[np.int64]:
    """Random positions among cells, ascending."""
    return draw(n_cells, size, generator(seed, Stream.GATE_CELLS))


def read_sample(
    census: Census,
    cells: Cells,
    rows: npt.NDArray[np.int64],
    genes: list[str],
    gene_joinids: npt.NDArray[np.int64],
    proteins: list[str] | None = None,
    measurement: str | None = None,
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
    proteins, measurement
        The model's proteins, and the measurement of the Census that has them; None for a model without proteins.
    """
    joinids = cells.joinids[rows]
    found = _read(census, joinids, var_coords=np.sort(gene_joinids[gene_joinids >= 0]).tolist())
    labels = np.array(cells.batches, dtype=object)[cells.batch_codes[rows]]
    counts = None
    if proteins and measurement:
        counts = _in_order(_read(census, joinids, measurement_name=measurement), proteins).toarray()
    obs = found.obs.assign(batch=labels).reset_index(drop=True)
    return Sample(rows, joinids, _in_order(found, genes), obs, counts)


def _read(census: Census, joinids: npt.NDArray[np.int64], **which: Any) -> ad.AnnData:
    """Cells in this order, with raw counts; `which`: arguments of `get_anndata`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transforming to str index")
        found = cellxgene_census.get_anndata(
            census.root, census.identity["organism"], obs_coords=joinids.tolist(), **which
        )
    return found[pd.Index(found.obs["soma_joinid"]).get_indexer(joinids)]


def _in_order(found: ad.AnnData, names: list[str]) -> sp.csr_matrix:
    """Counts of the features with these feature_ids, in their order, by a sparse matrix product; 0 if missing."""
    places = pd.Index(names).get_indexer(found.var["feature_id"].astype(str))
    here = np.flatnonzero(places >= 0)
    selection = sp.csr_matrix((np.ones(len(here), np.float32), (here, places[here])), shape=(found.n_vars, len(names)))
    counts = sp.csr_matrix(found.X).astype(np.float32) @ selection
    counts.sort_indices()
    return counts
