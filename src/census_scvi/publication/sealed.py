"""The sealed sample of a publication: counts, hashes of the counts, and embedding of some cells.

The file is read as untrusted input. Therefore everything is checked: the files that HDF5 would read values from, the
sizes, and the consistency of the parts.
"""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.config.run_names import PROTEIN_NAMES, PROTEINS
from census_scvi.counts.row_hash import count_hashes
from census_scvi.counts.untrusted import check_file
from census_scvi.errors import UserError
from census_scvi.model.published import SEALED
from census_scvi.model.safe import ModelDescription
from census_scvi.publication.sample import Sample

COUNT_HASH, SEALED_EMBEDDING = "count_hash", "X_scvi"
COLUMNS = ("soma_joinid", "observation_joinid", "dataset_id", "cell_type", "batch")


def write_sealed(folder: Path, description: ModelDescription, sample: Sample, latent: npt.NDArray[np.float32]) -> None:
    """Write cells with the hashes of their counts.

    Parameters
    ----------
    folder
        An existing folder.
    description
        The model, which names the genes and proteins.
    sample
        The cells; their obs has the available columns of `COLUMNS`.
    latent
        float32 (cells, n_latent): their embedding, as published.
    """
    counts, proteins = sample.counts, sample.proteins
    obs = sample.obs[[name for name in COLUMNS if name in sample.obs]]
    var = pd.DataFrame(index=pd.Index(description.genes, name="feature_id"))
    obsm = {SEALED_EMBEDDING: latent, **({} if proteins is None else {PROTEINS: proteins})}
    sealed = ad.AnnData(counts, obs=obs.assign(**{COUNT_HASH: count_hashes(counts, proteins)}), var=var, obsm=obsm)
    if proteins is not None:
        sealed.uns[PROTEIN_NAMES] = np.array(description.proteins, dtype=object)
    sealed.write_h5ad(folder / SEALED, compression="gzip")


def read_sealed(folder: Path, genes: list[str], n_latent: int, n_proteins: int = 0) -> ad.AnnData:
    """Read the sample; UserError if it does not match the model's genes, dimensions and number of proteins."""
    path = folder / SEALED
    try:
        with h5py.File(path) as file:
            check_file(file)
        cells = ad.read_h5ad(path)
        _check(cells, genes, n_latent)
        _check_proteins(cells, n_proteins)
    except UserError:
        raise
    except Exception as error:  # anndata has no specific exception for a damaged or forged file
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{SEALED} cannot be read ({reason}); fetch the published folder again") from None
    return cells


def _check(cells: ad.AnnData, genes: list[str], n_latent: int) -> None:
    """ValueError if a part is invalid; scipy does not check the indices of a sparse matrix by itself."""
    counts = sp.csr_matrix(cells.X)
    counts.check_format(full_check=True)
    if list(cells.var_names) != genes:
        raise ValueError("its genes are not the model's")
    if not cells.n_obs or counts.dtype != np.float32 or not np.isfinite(counts.data).all() or (counts.data < 0).any():
        raise ValueError("it has no cells, or values that are not counts")
    cells.X = counts
    latent, joinids = np.asarray(cells.obsm[SEALED_EMBEDDING]), cells.obs["soma_joinid"].to_numpy()
    if latent.shape != (cells.n_obs, n_latent) or latent.dtype != np.float32:
        raise ValueError(f"the embedding of its cells is {latent.dtype} {latent.shape}")
    if joinids.dtype != np.int64 or len(set(joinids.tolist())) < cells.n_obs or joinids.min() < 0:
        raise ValueError("soma_joinid has duplicates, negative values or other types than int64")
    if cells.obs[COUNT_HASH].dtype != np.uint64:
        raise ValueError(f"{COUNT_HASH} is {cells.obs[COUNT_HASH].dtype}, expected uint64")
    cells.obs["batch"] = cells.obs["batch"].astype(str).astype(object)


def _check_proteins(cells: ad.AnnData, n_proteins: int) -> None:
    """ValueError if the cells do not have counts of this number of proteins."""
    if not n_proteins:
        return
    proteins = np.asarray(cells.obsm[PROTEINS])
    if proteins.shape != (cells.n_obs, n_proteins) or proteins.dtype != np.float32:
        raise ValueError(f"the protein counts of its cells are {proteins.dtype} {proteins.shape}")
    if not np.isfinite(proteins).all() or (proteins < 0).any():
        raise ValueError("its cells have protein values that are not counts")
