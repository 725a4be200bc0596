"""What others read: slices as .h5ad (Python and R) and zarr, and the published embedding in the SOMA."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from pipeline import Run

from census_scvi.atlas import Atlas

# Prints cells and dimensions of the embedding, the first value, and the first cell type.
R_SCRIPT = """
suppressMessages(library(rhdf5))
file <- commandArgs(trailingOnly = TRUE)
latent <- h5read(file, "obsm/scvi")
codes <- h5read(file, "obs/cell_type/codes")
types <- h5read(file, "obs/cell_type/categories")
cat(dim(latent), latent[1, 1], types[codes[1] + 1], sep = "\\n")
"""


@pytest.fixture(scope="module")
def slice_of(finished_run: Run, demo_census: str) -> ad.AnnData:
    with Atlas.open(census=demo_census, embedding=finished_run.directory) as atlas:
        return atlas.embeddings("tissue_general == 'blood'")


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_a_slice_is_written_and_read(form: str, slice_of: ad.AnnData, tmp_path: Path) -> None:
    path = tmp_path / f"slice.{form}"
    getattr(slice_of, f"write_{form}")(path)
    read = getattr(ad, f"read_{form}")(path)
    assert np.array_equal(read.obsm["scvi"], slice_of.obsm["scvi"])
    pd.testing.assert_frame_equal(read.obs, slice_of.obs, check_categorical=False)
    sc.pp.neighbors(read, use_rep="scvi")
    assert read.obsp["distances"].shape == (slice_of.n_obs, slice_of.n_obs)


def test_r_reads_a_slice(slice_of: ad.AnnData, tmp_path: Path) -> None:
    if shutil.which("Rscript") is None or subprocess.run(["Rscript", "-e", "library(rhdf5)"], check=False).returncode:
        pytest.skip("R with the package rhdf5 is not installed: apt install r-base r-bioc-rhdf5")
    slice_of.write_h5ad(tmp_path / "slice.h5ad")
    (tmp_path / "read.R").write_text(R_SCRIPT)
    done = subprocess.run(
        ["Rscript", str(tmp_path / "read.R"), str(tmp_path / "slice.h5ad")], capture_output=True, text=True, check=True
    )
    n_dimensions, n_cells, value, cell_type = done.stdout.splitlines()  # R has the dimensions the other way round
    latent = slice_of.obsm["scvi"]
    assert (int(n_cells), int(n_dimensions)) == latent.shape
    assert float(value) == pytest.approx(float(latent[0, 0]), rel=1e-5)
    assert cell_type == slice_of.obs["cell_type"].iloc[0]
