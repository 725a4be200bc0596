"""Write scvi-tools' minified model: obs and latent posterior of each cell without counts, in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import scvi

from census_scvi.config.run_names import BATCH, LABELS
from census_scvi.counts.writer import H5adWriter
from census_scvi.model.build import quiet
from census_scvi.model.encode import Latent, batch_labels
from census_scvi.model.families import family_of
from census_scvi.model.safe import ModelDescription, save_for_scvi_tools

LIBRARY_SIZE_KEY = "observed_lib_size"
_MINIFIED = {"_scvi_adata_minify_type": "latent_posterior_parameters"}

# obs, batch codes (cells,) and posterior of some cells.
MinifiedBlock: TypeAlias = tuple[pd.DataFrame, npt.NDArray[np.int32], Latent]


def save_minified(
    model: scvi.model.SCVI,
    description: ModelDescription,
    blocks: Iterator[MinifiedBlock],
    folder: Path,
    uns: dict[str, Any],
) -> None:
    """Write model.pt and adata.h5ad as `minify_adata` and `save(save_anndata=True)` do, without all cells in memory.

    Parameters
    ----------
    model
        A trained model that has the batches of all cells, of a kind with a minified form.
    description
        The description of the trained model.
    blocks
        The cells, block by block; obs has the column of the labels of a SCANVI model.
    folder
        Folder to write.
    uns
        More entries of uns.
    """
    keys = family_of(description.model).latent_keys
    assert keys is not None, "only asked for where there is a minified form"
    _save_model(model, keys, folder)
    batches = batch_labels(model)
    var = pd.DataFrame(index=pd.Index(description.genes, name="feature_id"))
    with H5adWriter(folder / "adata.h5ad", var, uns=_MINIFIED | uns) as writer:
        for obs, codes, latent in blocks:
            obs = obs.assign(
                **{BATCH: pd.Categorical.from_codes(codes, categories=batches)},
                _scvi_batch=codes,
                **_labels(obs, description),
                **{LIBRARY_SIZE_KEY: latent.library_size},
            )
            writer.append(obs, obsm=dict(zip(keys, (latent.mean, latent.variance), strict=True)))


def _labels(obs: pd.DataFrame, description: ModelDescription) -> dict[str, Any]:
    """Columns of obs with the labels of a SCANVI model and their codes; other models have one label."""
    if not description.labels:
        return {"_scvi_labels": np.zeros(len(obs), dtype=np.int8)}
    every = [*description.labels, description.unlabeled_category]
    labels = pd.Categorical(obs[description.labels_key].astype(object), categories=every)
    codes = np.where(labels.codes < 0, len(every) - 1, labels.codes).astype(np.int32)
    return {LABELS: pd.Categorical.from_codes(codes, categories=every), "_scvi_labels": codes}


def _save_model(model: scvi.model.SCVI, keys: tuple[str, str], folder: Path) -> None:
    """Write model.pt of the minified form, with the model's few skeleton cells instead of the cells."""
    n_cells, n_latent = model.adata.n_obs, model.module.n_latent
    for key in keys:
        model.adata.obsm[key] = np.ones((n_cells, n_latent), dtype=np.float32)
    with quiet("scvi"):
        model.minify_adata(use_latent_qzm_key=keys[0], use_latent_qzv_key=keys[1])
        save_for_scvi_tools(model, folder)
