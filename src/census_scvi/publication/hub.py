"""Files of scvi-tools' model hub: the model with its trained batches, and a sample of cells without counts."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import scvi
from scvi.hub import HubMetadata

from census_scvi.model.encode import Latent, batch_labels
from census_scvi.model.minified import MinifiedBlock, save_minified
from census_scvi.model.safe import ModelDescription

_METADATA = "_scvi_required_metadata.json"


def write_hub(
    folder: Path,
    model: scvi.model.SCVI,
    description: ModelDescription,
    obs: pd.DataFrame,
    latent: Latent,
) -> list[str]:
    """Write `model.pt`, `adata.h5ad` (minified) and the hub's metadata; return their names.

    Parameters
    ----------
    folder
        An existing folder.
    model, description
        The trained model; it is minified in place.
    obs
        Cells, with the column `batch`. Cells of batches outside training are excluded: the decoder has no weights for
        them.
    latent
        Their posterior.
    """
    codes = pd.Index(batch_labels(model)).get_indexer(obs["batch"].astype(str))
    trained = np.flatnonzero(codes >= 0)
    posterior = Latent(latent.mean[trained], latent.variance[trained], latent.library_size[trained])
    cells = obs.iloc[trained].drop(columns="batch")
    block: MinifiedBlock = (cells, codes[trained].astype(np.int32), posterior)
    save_minified(model, description, iter([block]), folder, {})
    HubMetadata(scvi.__version__, version("anndata"), type(model).__name__).save(
        str(folder / _METADATA), overwrite=True
    )
    return ["model.pt", "adata.h5ad", _METADATA]
