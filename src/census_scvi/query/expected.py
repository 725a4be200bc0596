"""Estimate the share of a query's expected counts in the genes that it has."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import scvi
import torch

from census_scvi.model.encode import Encoder
from census_scvi.neighbors.index import NeighborIndex

# Maximum numbers of query cells and of trained batches that are used, and reference neighbors per cell.
_CELLS, _BATCHES, _NEIGHBORS = 256, 8, 15


class ExpectedCounts:
    """Estimates the counts in genes that a query lacks from the nearest reference cells.

    Neighbors are searched in the latent space, with the missing genes set to 0 in the reference. Without reference
    cells the model's decoder gives the estimate, which is less accurate after a short training.

    Parameters
    ----------
    model
        The trained model.
    n_trained
        Number of batches that it was trained on.
    reference
        Function that returns raw counts of some cells like those that the model was trained on, CSR float32 (cells,
        genes), or None.
    """

    def __init__(
        self, model: scvi.model.SCVI, n_trained: int, reference: Callable[[], sp.csr_matrix | None] | None = None
    ) -> None:
        self._module, self._encode, self._n_trained = model.module, Encoder(model), n_trained
        self._n_genes = int(model.summary_stats.n_vars)
        self._reference = reference

    def share(self, counts: sp.csr_matrix, there: npt.NDArray[np.bool_]) -> float:
        """Share of the expected counts in genes that the query has; NaN if no counts are expected.

        Parameters
        ----------
        counts
            CSR float32 (cells, genes of the model): raw counts of some cells, without empty cells.
        there
            bool (genes,): genes that the query has.
        """
        latent = self._latent(counts[:: -(-counts.shape[0] // _CELLS)])
        reference = self._reference() if self._reference is not None else None
        frequency = self._decoded(latent) if reference is None else self._of_neighbors(latent, reference, there)
        return float(frequency[there].sum() / frequency.sum()) if frequency.any() else float("nan")

    def _latent(self, counts: sp.csr_matrix) -> npt.NDArray[np.float32]:
        return self._encode(counts, np.full(counts.shape[0], self._n_trained)).mean

    def _of_neighbors(
        self, latent: npt.NDArray[np.float32], reference: sp.csr_matrix, there: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64]:
        without = sp.csr_matrix(reference.multiply(there[None, :]), dtype=np.float32)
        _, nearest = NeighborIndex(self._latent(without)).query(latent, _NEIGHBORS)
        return np.asarray(reference[nearest.ravel()].sum(axis=0), np.float64).ravel()

    @torch.inference_mode()
    def _decoded(self, latent: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        position = torch.from_numpy(latent).to(self._module.device)
        library = torch.zeros(len(latent), 1, device=position.device)
        total = np.zeros(self._n_genes)
        for code in np.unique(np.linspace(0, self._n_trained - 1, _BATCHES).astype(int)):
            batch = torch.full((len(latent), 1), int(code), device=position.device)
            total += self._scale(position, library, batch).double().sum(dim=0).cpu().numpy()
        return total

    def _scale(self, position: torch.Tensor, library: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Expected share of each gene in the counts of each cell, float32 (cells, genes)."""
        if not isinstance(self._module, scvi.module.TOTALVAE):
            return self._module.generative(position, library, batch)["px"].scale
        decoded = self._module.generative(position, library, batch, label=torch.zeros_like(batch))
        return decoded["px_"]["scale"]
