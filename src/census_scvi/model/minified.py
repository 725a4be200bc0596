"""Write scvi-tools' minified model: obs and latent posterior of each cell without counts, in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scvi

from census_scvi.counts.writer import H5adWriter
from census_scvi.model.build import quiet
from census_scvi.model.encode import Latent, batch_labels
from census_scvi.model.safe import save_for_scvi_tools

MEAN_KEY, VARIANCE_KEY = "scvi_latent_qzm", "scvi_latent_qzv"
LIBRARY_SIZE_KEY = "observed_lib_size"
_MINIFIED = {"_scvi_adata_minify_type": "latent_posterior_parameters"}


def save_minified(
    model: scvi.model.SCVI,
    genes: list[str],
    blocks: Iterator[tuple[pd.DataFrame, npt.NDArray[np.int32], Latent]],
    folder: Path,
    uns: dict[str, Any],
) -> None:
    """Write model.pt and adata.h5ad as `minify_adata` and `save(save_anndata=True)` do, without all cells in memory.

    Parameters
    ----------
    model
        A trained model that has the batches of all cells.
    genes
        Its genes.
    blocks
        obs, batch codes (cells,) and posterior of the cells, block by block.
    folder
        Folder to write.
    uns
        More entries of uns.
    """
    _save_model(model, folder)
    labels = batch_labels(model)
    var = pd.DataFrame(index=pd.Index(genes, name="feature_id"))
    with H5adWriter(folder / "adata.h5ad", var, uns=_MINIFIED | uns) as writer:
        for obs, codes, latent in blocks:
            obs = obs.assign(
                batch=pd.Categorical.from_codes(codes, categories=labels),
                _scvi_batch=codes,
                _scvi_labels=np.zeros(len(obs), dtype=np.int8),
                **{LIBRARY_SIZE_KEY: latent.library_size},
            )
            writer.append(obs, obsm={MEAN_KEY: latent.mean, VARIANCE_KEY: latent.variance})


def _save_model(model: scvi.model.SCVI, folder: Path) -> None:
    """Write model.pt of the minified form, with the model's few skeleton cells instead of the cells."""
    n_cells, n_latent = model.adata.n_obs, model.module.n_latent
    for key in (MEAN_KEY, VARIANCE_KEY):
        model.adata.obsm[key] = np.ones((n_cells, n_latent), dtype=np.float32)
    with quiet("scvi"):
        model.minify_adata(use_latent_qzm_key=MEAN_KEY, use_latent_qzv_key=VARIANCE_KEY)
        save_for_scvi_tools(model, folder)
