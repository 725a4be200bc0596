"""One measured side of benchmarks/scale.py: runs in a new process and prints time and memory as JSON.

Other libraries are called as their users call them. Each side starts the clock after its imports, so imports are not
timed. Peak memory is that of the whole process, including its libraries.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

ORGANISM, BATCH_KEY, HVG_BATCH = "homo_sapiens", ["dataset_id", "donor_id"], ["assay"]
MINIBATCH, MINIBATCHES = 1024, 150


class Clock:
    """Clock for CPU-seconds and wall time."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start again from zero."""
        self._cpu, self._wall = time.process_time(), time.monotonic()

    def taken(self) -> dict[str, float]:
        """Seconds since the start: `cpu` and `wall`."""
        return {"cpu": time.process_time() - self._cpu, "wall": time.monotonic() - self._wall}


CLOCK = Clock()


class Folder:
    """Paths of the Census, a prepared run and a trained model."""

    def __init__(self, path: Path, n_genes: int) -> None:
        self.census, self.model, self.prepared = (str(path / name) for name in ("census", "model", "prepared"))
        self.uncompressed = str(path / "uncompressed")
        self.scratch = path / "scratch"
        self.n_genes = n_genes

    def settings(self, directory: str) -> list[str]:
        """Settings of a run on the Census; the config file is empty."""
        return [
            f"census.uri={self.census}",
            f"output.directory={directory}",
            f"hvg.top_n_hvg={self.n_genes}",
            f"hvg.hvg_batch={HVG_BATCH}",
            f"anndata.batch_key={BATCH_KEY}",
            "census.obs_query_model='is_primary_data == True and nnz >= 300'",
        ]


def run_stage(stage: str, folder: Folder, directory: str, *more: str) -> None:
    """Run a stage of this project as its script does."""
    from census_scvi.cli import main

    import_module(f"census_scvi.stages.{stage.replace('-', '_')}")
    CLOCK.start()
    config = folder.scratch.parent / "empty.yaml"
    config.write_text("census:\n")
    if main(stage, ["--config", str(config), *folder.settings(directory), *more, "--force"]):
        raise SystemExit(f"{stage} failed")


def hvg_ours(folder: Folder) -> Any:
    from census_scvi.census.genes import select_genes
    from census_scvi.census.open import open_census
    from census_scvi.census.settings import CensusSection, HvgSection

    CLOCK.start()
    with open_census(CensusSection(uri=folder.census)) as census:
        return select_genes(census, None, HvgSection(top_n_hvg=folder.n_genes, hvg_batch=HVG_BATCH), seed=0).feature_ids


def hvg_library(folder: Folder) -> Any:
    import cellxgene_census
    from cellxgene_census.experimental.pp import highly_variable_genes

    CLOCK.start()
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
    import cellxgene_census
    import tiledbsoma
    from cellxgene_census.experimental.pp import highly_variable_genes

    CLOCK.start()
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
    """Embed without writing a minified model, like the other side."""
    settings = ("census.obs_query_model='soma_joinid < 5000'", "latent.minified=none")
    run_stage("create-latent-update", folder, folder.model, *settings)
    return np.load(Path(folder.model) / "latent.npy")


def latent_library(folder: Folder) -> Any:
    import cellxgene_census
    import scvi
    import tiledbsoma

    from census_scvi.census.genes import read_genes

    CLOCK.start()
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
    """Count cells of some minibatches; the clock starts after the first one, which opens files and compiles code."""
    cells = 0
    next(minibatches)
    CLOCK.start()
    for _, minibatch in zip(range(MINIBATCHES), minibatches, strict=False):
        cells += len(minibatch["row"] if isinstance(minibatch, dict) and "row" in minibatch else _dense(minibatch))
    return cells


def _dense(minibatch: Any) -> Any:
    return minibatch["X"] if isinstance(minibatch, dict) else minibatch


def loader_ours(folder: Folder) -> Any:
    return _consume(_ours(folder.prepared, "cpu"))


def loader_ours_uncompressed(folder: Folder) -> Any:
    return _consume(_ours(folder.uncompressed, "cpu"))


def loader_ours_sparse(folder: Folder) -> Any:
    """Load sparse minibatches, as for a GPU, which converts them to dense."""
    return _consume(_ours(folder.prepared, "meta"))


def _ours(directory: str, device: str) -> Iterator[Any]:
    import torch

    from census_scvi.counts.loader import MinibatchLoader
    from census_scvi.counts.minibatch import DenseMinibatches
    from census_scvi.counts.order import CellOrder
    from census_scvi.counts.reader import PreparedCells

    cells = PreparedCells(Path(directory) / "anndata_model.h5ad")
    order = CellOrder(np.ones(cells.n_cells, bool), seed=0)
    dense = DenseMinibatches(cells.n_genes)
    loader = MinibatchLoader(
        cells, order, MINIBATCH, 2, epoch=lambda: 0, device=lambda: torch.device(device), dense=dense
    )
    for minibatch in loader:
        yield minibatch
        dense.give_back(minibatch)


def loader_scvi_in_memory(folder: Folder) -> Any:
    import anndata as ad
    import scvi

    adata = ad.read_h5ad(Path(folder.prepared) / "anndata_model.h5ad")
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    manager = scvi.model.SCVI(adata).adata_manager
    return _consume(iter(scvi.dataloaders.AnnDataLoader(manager, batch_size=MINIBATCH, shuffle=True)))


def loader_scdataset(folder: Folder) -> Any:
    import anndata as ad
    import torch
    from scdataset import BlockShuffling, scDataset

    CLOCK.start()
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


def _training_query(folder: Folder) -> Any:
    """Query of the training cells and selected genes, the input of the Census' loaders."""
    import cellxgene_census
    import tiledbsoma

    from census_scvi.census.genes import read_genes

    genes = read_genes(Path(folder.prepared) / "hv_genes.pkl")
    experiment = cellxgene_census.open_soma(uri=folder.census)["census_data"][ORGANISM]
    var = experiment.ms["RNA"].var.read().concat().to_pandas()
    joinids = var.loc[var["feature_id"].isin(genes), "soma_joinid"].tolist()
    cells = tiledbsoma.AxisQuery(value_filter="is_primary_data == True and nnz >= 300")
    return experiment.axis_query("RNA", obs_query=cells, var_query=tiledbsoma.AxisQuery(coords=(joinids,)))


def loader_tiledbsoma_ml(folder: Folder) -> Any:
    from tiledbsoma_ml import ExperimentDataset, experiment_dataloader

    dataset = ExperimentDataset(
        _training_query(folder),
        layer_name="raw",
        obs_column_names=["dataset_id"],
        batch_size=MINIBATCH,
        shuffle=True,
    )
    return _consume(minibatch[0] for minibatch in iter(experiment_dataloader(dataset)))


def loader_scvi_tiledb(folder: Folder) -> Any:
    """Load from the Census with scvi-tools' TileDBDataModule."""
    import scvi

    module = scvi.dataloaders.TileDBDataModule(
        _training_query(folder),
        layer_name="raw",
        batch_column_names=BATCH_KEY,
        batch_size=MINIBATCH,
        train_size=1.0,
        shuffle=True,
        seed=42,
        dataloader_kwargs={"num_workers": 0},
    )
    module.setup("fit")
    return _consume(module.on_before_batch_transfer(minibatch, None) for minibatch in iter(module.train_dataloader()))


def loader_annbatch(folder: Folder) -> Any:
    """Load from annbatch's store, converted from the prepared file; settings of its README, dense on the CPU."""
    import zarr
    from annbatch import DatasetCollection, Loader

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    store = folder.scratch.parent / "annbatch.zarr"
    if not store.exists():
        DatasetCollection(store).add_adatas([Path(folder.prepared) / "anndata_model.h5ad"], shuffle=True)
    loader = Loader(batch_size=MINIBATCH, chunk_size=512, preload_nchunks=32, shuffle=True, to="torch")
    loader.use_collection(DatasetCollection(store, mode="r"))
    return _consume(_to_dense(minibatch["X"]) for minibatch in iter(loader))


def _to_dense(counts: Any) -> Any:
    return counts.to_dense() if hasattr(counts, "to_dense") else counts.toarray()


SIDES: dict[str, Callable[[Folder], Any]] = {
    name: value for name, value in globals().items() if name.partition("_")[0] in {"hvg", "prepare", "latent", "loader"}
}


def _peak_memory_bytes() -> int:
    """Peak memory of this process; not imported from this project, since some sides run without it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure(name: str, folder: Folder) -> dict[str, Any]:
    """Run one side, save its result for the comparison, and return time and memory."""
    np.random.seed(0)
    shutil.rmtree(folder.scratch, ignore_errors=True)
    CLOCK.start()
    result = SIDES[name](folder)
    taken = CLOCK.taken()
    np.save(folder.scratch.parent / f"{name}.npy", np.asarray(result))
    return {**taken, "peak": _peak_memory_bytes()}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Folder(Path(sys.argv[2]), int(sys.argv[3])))))
