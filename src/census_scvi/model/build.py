"""An scVI model from settings, genes and batches, without the cells."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi

from census_scvi.config import ModelSection

# scvi-tools warns of batches with fewer cells than this.
_CELLS_A_BATCH = 3


def init_arguments(settings: ModelSection) -> dict[str, Any]:
    """Arguments of `scvi.model.SCVI` for the `model` section."""
    return settings.model_dump(include=_INIT_ARGUMENTS)


_INIT_ARGUMENTS = {"n_hidden", "n_latent", "n_layers", "dropout_rate", "gene_likelihood", "encode_covariates"}


def skeleton(genes: list[str], batches: list[str]) -> ad.AnnData:
    """A few empty cells of each batch: all that scvi-tools' registry needs to know of millions of cells.

    Returns
    -------
    AnnData with var names `genes`, the categorical obs column `batch` with categories `batches` and float32 CSR zeros.
    """
    labels = pd.Categorical(np.repeat(batches, _CELLS_A_BATCH), categories=batches)
    counts = sp.csr_matrix((len(labels), len(genes)), dtype=np.float32)
    obs = pd.DataFrame({"batch": labels}, index=[str(i) for i in range(len(labels))])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=pd.Index(genes, name="feature_id")))


def build_model(
    genes: list[str], batches: list[str], arguments: dict[str, Any], *, n_cells: int | None = None
) -> scvi.model.SCVI:
    """An untrained model whose registry is the one that the cells themselves would give.

    Parameters
    ----------
    genes
        feature_ids, in the order of the columns.
    batches
        Batch labels, in the order of the codes.
    arguments
        Arguments of `scvi.model.SCVI`.
    n_cells
        Cells that the registry shall name.
    """
    adata = skeleton(genes, batches)
    with quiet("scvi"):
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
        model = scvi.model.SCVI(adata, **arguments)
    if n_cells is not None:
        counts = model.adata_manager.registry["field_registries"]["X"]
        counts["summary_stats"]["n_cells"] = counts["state_registry"]["n_obs"] = n_cells
    return model


@contextmanager
def quiet(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Silence a library's log below a level, for what we know and mean."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
