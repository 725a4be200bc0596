"""Files of scvi-tools' model hub: the model with its trained batches, and a sample of cells."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scvi
from scvi.hub import HubMetadata

from census_scvi.config.run_names import BATCH, PROTEIN_NAMES, PROTEINS
from census_scvi.model.encode import Encoder
from census_scvi.model.families import family_of
from census_scvi.model.minified import MinifiedBlock, save_minified
from census_scvi.model.safe import ModelDescription, save_for_scvi_tools
from census_scvi.publication.sample import Sample

_METADATA = "_scvi_required_metadata.json"


def write_hub(folder: Path, model: scvi.model.SCVI, description: ModelDescription, sample: Sample) -> list[str]:
    """Write `model.pt`, `adata.h5ad` and the hub's metadata; return their names.

    `adata.h5ad` has the latent posterior of the cells instead of their counts (minified). A kind of model without such
    a form gets the cells with their counts.

    Parameters
    ----------
    folder
        An existing folder.
    model, description
        The trained model; it is minified in place.
    sample
        Cells; of those of batches outside training the decoder has no weights, so they are excluded.
    """
    trained = np.flatnonzero(trained_cells(sample, description))
    if family_of(description.model).latent_keys is None:
        save_for_scvi_tools(model, folder)
        _with_counts(sample, trained, description).write_h5ad(folder / "adata.h5ad", compression="gzip")
    else:
        counts, cells = sample.counts[trained], sample.obs.iloc[trained]
        codes = pd.Index(description.batches).get_indexer(cells[BATCH].astype(str)).astype(np.int32)
        block: MinifiedBlock = (cells.drop(columns=BATCH), codes, Encoder(model)(counts, codes))
        save_minified(model, description, iter([block]), folder, {})
    HubMetadata(scvi.__version__, version("anndata"), description.model).save(str(folder / _METADATA), overwrite=True)
    return ["model.pt", "adata.h5ad", _METADATA]


def trained_cells(sample: Sample, description: ModelDescription) -> npt.NDArray[np.bool_]:
    """Whether each cell is of a batch that the model was trained on, bool (cells,)."""
    return sample.obs[BATCH].astype(str).isin(description.batches).to_numpy()


def _with_counts(sample: Sample, rows: npt.NDArray[np.int64], description: ModelDescription) -> ad.AnnData:
    """Cells with the counts of genes and proteins, as the model was set up with them."""
    obs = sample.obs.iloc[rows]
    batch = pd.Categorical(obs[BATCH].astype(str), categories=description.batches)
    cells = ad.AnnData(sample.counts[rows], obs=obs.assign(**{BATCH: batch}))
    cells.var_names = pd.Index(description.genes, name="feature_id")
    if sample.proteins is not None:
        cells.obsm[PROTEINS] = sample.proteins[rows]
        cells.uns[PROTEIN_NAMES] = np.array(description.proteins, dtype=object)
    return cells
