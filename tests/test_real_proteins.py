"""Real CITE-seq cells: from files to a TOTALVI model, and to cells that lack proteins and name them differently."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from pipeline import Run
from scipy.stats import spearmanr
from test_proteins import build_yaml, write_config

from census_scvi.atlas import Atlas
from census_scvi.cli import main

pytestmark = pytest.mark.slow

# Proteins that the query does not have.
LACKING = ["CD45RO", "CD56", "CD127", "PD-1", "TIGIT"]


@pytest.fixture(scope="module")
def cells(real_data: Path) -> ad.AnnData:
    path = real_data / "citeseq_pbmc_2batch_human.h5ad"
    if not path.exists():
        pytest.skip(f"needs the CITE-seq cells of {path}")
    return ad.read_h5ad(path)


@pytest.fixture(scope="module")
def run(cells: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model of the 10k cells in two batches, which are two datasets of a Census."""
    folder = tmp_path_factory.mktemp("citeseq")
    reference = cells[cells.obs["batch"] == "pbmc_10k_protein_v3"].copy()
    reference.obs["half"] = np.where(np.arange(reference.n_obs) % 2, "r1", "r2")
    reference.write_h5ad(folder / "reference.h5ad")
    columns = {"dataset_id": {"column": "half"}, "obs": {"donor_id": "half"}}
    report = build_yaml(write_config(folder, {"file": "reference.h5ad", **columns}))
    assert report.n_proteins == {"homo_sapiens": 14}
    return Run(
        folder,
        report.uri,
        census={"obs_query_model": "is_primary_data == True"},
        hvg={"top_n_hvg": 1000, "hvg_batch": ["dataset_id"]},
        anndata={"protein_measurement": "protein", "batch_key": ["donor_id"]},
        model={
            "kind": "TOTALVI", "n_hidden": 32, "n_latent": 8, "encode_covariates": True,
            "arguments": {"use_layer_norm": "both", "use_batch_norm": "none"},
        },
        train={"max_epochs": 40, "batch_size": 32},
        training_plan={"lr": 4e-3, "n_epochs_kl_warmup": 20},
    ).all()  # fmt: skip


@pytest.fixture(scope="module")
def query(cells: ad.AnnData) -> ad.AnnData:
    """The 5k cells with nine of the 14 proteins, named as in an antibody panel."""
    made = cells[cells.obs["batch"] == "pbmc_5k_protein_v3"].copy()
    proteins = made.obsm["protein_expression"]
    made.obs["half"] = np.where(np.arange(made.n_obs) % 2, "q1", "q2")
    made.obsm["protein_expression"] = proteins.drop(columns=LACKING).add_suffix("_TotalSeqB")
    return made


def test_missing_proteins_are_imputed(run: Run, query: ad.AnnData, cells: ad.AnnData) -> None:
    with Atlas.open(run.directory) as atlas:
        assert atlas.description is not None
        found = atlas.denoised(query, transform_batch=atlas.description.batches, n_samples=5)
    measured = cells[query.obs_names].obsm["protein_expression"]
    for kind in ("protein_expression", "protein_foreground"):
        decoded = found.obsm[kind]
        assert sorted(decoded) == sorted(measured)
        agreement = pd.Series({name: spearmanr(measured[name], decoded[name])[0] for name in measured})
        assert agreement[["CD3", "CD14", "CD127"]].min() > 0.4  # CD127 is one of those that the query lacks
        assert agreement[LACKING].mean() > 0.1


def test_new_batches_are_added_to_the_model_with_their_proteins(run: Run, query: ad.AnnData, tmp_path: Path) -> None:
    query.write_h5ad(tmp_path / "query.h5ad")
    settings = ["query.umap_cells=0", "query.labels=[]", "query.surgery=joint", "query.batch_key=[half]"]
    training = "query.surgery_training={max_epochs: 3}"
    assert (
        main("map-query", ["--config", str(run.config), f"query.file={tmp_path / 'query.h5ad'}", *settings, training])
        == 0
    )
    report = json.loads((tmp_path / "query-mapped.json").read_text())
    assert report["proteins"]["missing"] == LACKING
    assert report["proteins"]["n_shared"] == len(report["proteins"]["renamed"]) == 9
    assert all(training["moved"]["latent"] < 1e-5 for training in report["surgery"]["trainings"])
    with Atlas.open(tmp_path / "query-mapped-model") as adapted:
        again = adapted.embed(query).obsm["X_scvi"]
        own = adapted.denoised(query).obsm["protein_foreground"]
    np.testing.assert_allclose(again, ad.read_h5ad(tmp_path / "query-mapped.h5ad").obsm["X_scvi"], atol=1e-5)
    assert own.shape == (query.n_obs, 14)
    assert own.to_numpy().min() >= 0
    assert own.to_numpy().max() <= 1
