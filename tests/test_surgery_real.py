"""Surgery on real blood: from cells to an extended model that plain scvi-tools loads."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
from test_surgery_kinds import trained

from census_scvi import Atlas
from census_scvi.model.build import without_training

CELLS, N_GENES = 250, 600


@pytest.fixture(scope="module")
def blood(real_data: Path) -> tuple[ad.AnnData, ad.AnnData]:
    """pbmc3k and FACS-sorted blood as reference, Kang et al.'s two conditions as query: some cells and genes."""
    cells = ad.read_h5ad(real_data / "pbmc_multi_human.h5ad")
    numbers = np.random.default_rng(0)
    cells.obs["batch"] = cells.obs["batch"].astype(str)
    cells.obs["cell_type"] = cells.obs["cell_type_coarse"].astype(str)
    cells = cells[cells.obs["cell_type"] != "unknown"]
    kang = sorted(name for name in cells.obs["batch"].unique() if name.startswith("kang"))
    parts = []
    for batches in (["pbmc3k", "zheng_facs"], kang):
        rows = [numbers.permutation(np.flatnonzero(cells.obs["batch"] == name))[:CELLS] for name in batches]
        parts.append(cells[np.sort(np.concatenate(rows))].copy())
    genes = np.argsort(np.asarray(parts[0].X.sum(axis=0)).ravel())[::-1][:N_GENES]
    reference, query = (part[:, np.sort(genes)].copy() for part in parts)
    return reference, query


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SCVI", "SCANVI"])
def test_from_real_cells_to_an_extended_model(kind: str, blood: tuple[ad.AnnData, ad.AnnData], tmp_path: Path) -> None:
    reference, query = blood
    atlas = Atlas.open(trained(kind, reference, tmp_path / "reference"))
    before = atlas.embed(query).obsm["X_scvi"]
    for mode in ("joint", "per_batch", "sequential"):
        adapted = atlas.adapt(
            query, "batch", mode=mode, training={"max_epochs": 5, "lr": 1e-2}, folder=tmp_path / mode, seed=1
        )
        assert max(each["moved"]["latent"] for each in adapted.surgery["trainings"]) <= 1e-5
        latent = adapted.embed(query).obsm["X_scvi"]
        assert np.abs(latent - before).max() > 0.01 * before.std()
        both = ad.concat([reference, query])
        known = adapted.embed(both).obsm["X_scvi"]
        assert np.array_equal(known[reference.n_obs :], latent)
        if mode == "per_batch":
            continue
        both.obs["labels"] = "unknown"
        both.X = sp.csr_matrix(both.X)
        with without_training():
            plain = getattr(scvi.model, kind).load(str(tmp_path / mode), adata=both, accelerator="cpu")
        np.testing.assert_allclose(plain.get_latent_representation(), known, atol=1e-5)
        assert pd.Index(adapted.description.batches).tolist()[:2] == ["pbmc3k", "zheng_facs"]
