"""One measured side of benchmarks/scale.py: does its work in a fresh process and prints what it took as JSON.

Peer code is called as its users call it. Imports are not timed; peak memory is the whole process', imports included.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import cellxgene_census
import numpy as np
import scvi
import tiledbsoma
import torch
from cellxgene_census.experimental.pp import highly_variable_genes
from lightning.pytorch import seed_everything

from census_scvi.census.genes import read_genes, select_genes
from census_scvi.census.open import open_census
from census_scvi.cli import main
from census_scvi.config import CensusSection, HvgSection
from census_scvi.counts.loader import PreparedDataModule
from census_scvi.workspace.provenance import peak_memory_bytes

ORGANISM, BATCH_KEY, HVG_BATCH = "homo_sapiens", ["dataset_id", "donor_id"], ["assay"]
MINIBATCH, MINIBATCHES = 1024, 60


class Folder:
    """Where the Census, a prepared run and a trained model lie."""

    def __init__(self, path: Path, n_genes: int) -> None:
        self.census, self.model, self.prepared = (str(path / name) for name in ("census", "model", "prepared"))
        self.scratch = path / "scratch"
        self.n_genes = n_genes

    def settings(self, directory: str) -> list[str]:
        """Settings of a run on the Census; the config file is an empty one."""
        return [
            f"census.uri={self.census}",
            f"output.directory={directory}",
            f"hvg.top_n_hvg={self.n_genes}",
            f"hvg.hvg_batch={HVG_BATCH}",
            f"anndata.batch_key={BATCH_KEY}",
            "census.obs_query_model='is_primary_data == True and nnz >= 300'",
        ]


def run_stage(stage: str, folder: Folder, directory: str, *more: str) -> None:
    """A stage of this project, as its script runs it."""
    config = folder.scratch.parent / "empty.yaml"
    config.write_text("census:\n")
    if main(stage, ["--config", str(config), *folder.settings(directory), *more, "--force"]):
        raise SystemExit(f"{stage} failed")


def hvg_ours(folder: Folder) -> Any:
    with open_census(CensusSection(uri=folder.census)) as census:
        return select_genes(census, None, HvgSection(top_n_hvg=folder.n_genes, hvg_batch=HVG_BATCH), seed=0)


def hvg_library(folder: Folder) -> Any:
    with cellxgene_census.open_soma(uri=folder.census) as root:
        experiment = root["census_data"][ORGANISM]
        with experiment.axis_query("RNA") as query:
            scores = highly_variable_genes(query, n_top_genes=folder.n_genes, batch_key=HVG_BATCH)
        var = experiment.ms["RNA"].var.read().concat().to_pandas().set_index("soma_joinid")
    return var.loc[scores.index[scores["highly_variable"]], "feature_id"].tolist()


def prepare_ours(folder: Folder) -> Any:
    run_stage("prepare", folder, str(folder.scratch))
    return (folder.scratch / "anndata_model.h5ad").stat().st_size


def prepare_library(folder: Folder) -> Any:
    folder.scratch.mkdir(exist_ok=True)
    with cellxgene_census.open_soma(uri=folder.census) as root:
        experiment = root["census_data"][ORGANISM]
        cells = tiledbsoma.AxisQuery(value_filter="is_primary_data == True and nnz >= 300")
        with experiment.axis_query("RNA", obs_query=cells) as query:
            scores = highly_variable_genes(query, n_top_genes=folder.n_genes, batch_key=HVG_BATCH)
        genes = tiledbsoma.AxisQuery(coords=(list(scores.index[scores["highly_variable"]]),))
        with experiment.axis_query("RNA", obs_query=cells, var_query=genes) as query:
            adata = query.to_anndata("raw")
    adata.obs["batch"] = adata.obs[BATCH_KEY].astype(str).agg("".join, axis=1)
    adata.var = adata.var.set_index("feature_id")
    adata.write_h5ad(folder.scratch / "library.h5ad", compression="gzip")
    return (folder.scratch / "library.h5ad").stat().st_size


def latent_ours(folder: Folder) -> Any:
    run_stage("create-latent-update", folder, folder.model, "census.obs_query_model='soma_joinid < 5000'")
    return np.load(Path(folder.model) / "latent.npy")


def latent_library(folder: Folder) -> Any:
    genes = read_genes(Path(folder.model) / "hv_genes.pkl")
    with cellxgene_census.open_soma(uri=folder.census) as root:
        experiment = root["census_data"][ORGANISM]
        var = experiment.ms["RNA"].var.read().concat().to_pandas()
        joinids = var.loc[var["feature_id"].isin(genes), "soma_joinid"].tolist()
        with experiment.axis_query("RNA", var_query=tiledbsoma.AxisQuery(coords=(joinids,))) as query:
            adata = query.to_anndata("raw")
    adata.obs["batch"] = adata.obs[BATCH_KEY].astype(str).agg("|".join, axis=1)
    adata.var = adata.var.set_index("feature_id")
    model = str(Path(folder.model) / "scvi.model")
    scvi.model.SCVI.prepare_query_anndata(adata, model)
    query = scvi.model.SCVI.load_query_data(adata, model)
    query.is_trained = True
    return query.get_latent_representation()


def _consume(minibatches: Iterator[Any]) -> int:
    """Cells of some dense minibatches."""
    cells = 0
    for _, minibatch in zip(range(MINIBATCHES), minibatches, strict=False):
        x = minibatch["X"] if isinstance(minibatch, dict) else minibatch
        cells += len(x)
    return cells


def loader_ours(folder: Folder) -> Any:
    file = Path(folder.prepared) / "anndata_model.h5ad"
    data = PreparedDataModule(file, batch_size=MINIBATCH, train_size=1.0, seed=0, workers=1)
    return _consume(iter(data.train_dataloader()))


def loader_scvi_in_memory(folder: Folder) -> Any:
    adata = ad.read_h5ad(Path(folder.prepared) / "anndata_model.h5ad")
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    manager = scvi.model.SCVI(adata).adata_manager
    started = time.process_time(), time.monotonic()
    cells = _consume(iter(scvi.dataloaders.AnnDataLoader(manager, batch_size=MINIBATCH, shuffle=True)))
    return {"cells": cells, "cpu": time.process_time() - started[0], "wall": time.monotonic() - started[1]}


def loader_scdataset(folder: Folder) -> Any:
    from scdataset import BlockShuffling, scDataset

    adata = ad.read_h5ad(Path(folder.prepared) / "anndata_model.h5ad", backed="r")
    dataset = scDataset(
        adata,
        BlockShuffling(block_size=64),
        batch_size=MINIBATCH,
        fetch_factor=32,
        fetch_transform=lambda fetched: fetched.to_memory(),
        batch_transform=lambda batch: torch.from_numpy(batch.X.toarray()),
    )
    return _consume(iter(dataset))


def loader_tiledbsoma_ml(folder: Folder) -> Any:
    from tiledbsoma_ml import ExperimentDataset, experiment_dataloader

    genes = read_genes(Path(folder.prepared) / "hv_genes.pkl")
    root = cellxgene_census.open_soma(uri=folder.census)
    experiment = root["census_data"][ORGANISM]
    var = experiment.ms["RNA"].var.read().concat().to_pandas()
    joinids = var.loc[var["feature_id"].isin(genes), "soma_joinid"].tolist()
    cells = tiledbsoma.AxisQuery(value_filter="is_primary_data == True and nnz >= 300")
    query = experiment.axis_query("RNA", obs_query=cells, var_query=tiledbsoma.AxisQuery(coords=(joinids,)))
    dataset = ExperimentDataset(
        query, layer_name="raw", obs_column_names=["dataset_id"], batch_size=MINIBATCH, shuffle=True
    )
    return _consume(minibatch[0] for minibatch in experiment_dataloader(dataset))


SIDES: dict[str, Callable[[Folder], Any]] = {
    name: value for name, value in globals().items() if name.partition("_")[0] in {"hvg", "prepare", "latent", "loader"}
}


def measure(name: str, folder: Folder) -> dict[str, Any]:
    """Run one side; its result goes to a file for the comparison."""
    seed_everything(0, verbose=False)
    shutil.rmtree(folder.scratch, ignore_errors=True)
    cpu, wall = time.process_time(), time.monotonic()
    result = SIDES[name](folder)
    taken = {"cpu": time.process_time() - cpu, "wall": time.monotonic() - wall}
    if isinstance(result, dict):  # it timed a part itself: what a user waits for once is not what is compared
        taken |= {key: result.pop(key) for key in ("cpu", "wall")}
        result = result["cells"]
    np.save(folder.scratch.parent / f"{name}.npy", np.asarray(result))
    return {**taken, "peak": peak_memory_bytes()}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Folder(Path(sys.argv[2]), int(sys.argv[3])))))
