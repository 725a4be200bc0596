"""Releases compared: real blood cells in two versions and by several models, or the cost for many simulated cells.

    python benchmarks/releases.py --folder FOLDER --data DATA
    python benchmarks/releases.py --folder FOLDER --cells 1000000

With --data: DATA holds pbmc_multi_human.h5ad, citeseq_pbmc_2batch_human.h5ad and gene_map_human.tsv.gz. A Census of
three studies and one of four are built, models are trained on both, and `census-scvi compare-releases` compares them.

With --cells: two releases of this number of simulated cells each, with simulated embeddings of 50 dimensions; nine
tenths of the cells are in both. Prints wall time, CPU time and peak memory of `census-scvi compare-releases`.

Everything is written to FOLDER and not made again. docs/releases.md has the results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import yaml

from census_scvi.census.gene_ids import GeneReport
from census_scvi.census.schema import LABEL_COLUMNS, default_label
from census_scvi.local_census.sources import regroup
from census_scvi.local_census.write import build_census
from census_scvi.workspace.identity import identities

CONFIGS = Path(__file__).absolute().parents[1] / "configs"
STAGES = ("prepare", "train", "create-latent-update")
ADDED_STUDY = "pbmc3k"  # the first in the file: the soma_joinids of all other cells change
# Settings of a short training that reaches the accuracy of the published settings on these cells (docs/blood.md).
SHORT = {
    "model": {"n_hidden": 256},
    "train": {"batch_size": 128, "max_epochs": 6},
    "training_plan": {"lr": 1e-3},
    "evaluate": {"measured_cells": 2000, "batches": ["dataset_id"]},
    "query": {"baseline_cells": 0},
    "annotate": {"method": "neighbors"},
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "three studies": ("three", {}),
    "four studies": ("four", {}),
    "four studies, seed 1": ("four", {"seed": 1}),
    "four studies, 10 dimensions": ("four", {"model": {"n_hidden": 256, "n_latent": 10}}),
}
COMPARED = [("three studies", "four studies"), ("four studies, seed 1", "four studies")]
COMPARED += [("four studies, 10 dimensions", "four studies")]


def main() -> None:
    """Make what is missing, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cells", type=int)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.data:
        blood(folder, arguments.data.absolute())
    if arguments.cells:
        scale(folder, arguments.cells)


def blood(folder: Path, data: Path) -> None:
    """Compare releases of real cells, and print a row for each comparison."""
    build_blood(folder, data)
    for name, (census, changes) in RUNS.items():
        run(folder, name, {"extends": str(CONFIGS / "blood.yaml"), **SHORT, **changes}, folder / f"census-{census}")
    print("| old | new | neighbors in common | label stability | own label, old | new | movement | same prediction |")
    print("|---|---|---|---|---|---|---|---|")
    for old, new in COMPARED:
        target = folder / f"from {old}"
        settings = [f"compare_releases.old={place(folder, old)}", f"compare_releases.folder={target}"]
        census_scvi(folder, new, "compare-releases", *settings, f"query.file={data / 'citeseq_pbmc_2batch_human.h5ad'}")
        found = json.loads((target / "comparison.json").read_text())
        measures = ("neighbor_overlap", "label_stability", "old_accuracy", "new_accuracy", "movement")
        shown = [
            f"{each['value']:.3f} ({each['low']:.3f} to {each['high']:.3f})"
            for each in (found["overall"][measure] for measure in measures)
        ]
        same = found["predictions"]["labels"]["cell_type"]["same"]
        print(f"| {old} | {new} | {' | '.join(shown)} | {same:.3f} |", flush=True)


def build_blood(folder: Path, data: Path) -> None:
    """A Census of all studies, and one without the first of them."""
    cells = ad.read_h5ad(data / "pbmc_multi_human.h5ad")
    build = yaml.safe_load((CONFIGS / "build-blood.yaml").read_text())
    build["genes"]["map"]["homo_sapiens"] = str(data / "gene_map_human.tsv.gz")
    for name, chosen in (("three", cells[cells.obs["dataset"] != ADDED_STUDY]), ("four", cells)):
        if (folder / f"census-{name}").exists():
            continue
        chosen.copy().write_h5ad(folder / f"{name}.h5ad")
        build["uri"], build["data"] = str(folder / f"census-{name}"), str(folder)
        build["datasets"][0]["file"] = f"{name}.h5ad"
        (folder / f"build-{name}.yaml").write_text(yaml.safe_dump(build))
        command("build-census", str(folder / f"build-{name}.yaml"))


class Simulated:
    """A dataset of simulated cells with few genes (a `Source`)."""

    path, organism = "", "homo_sapiens"
    proteins: tuple[str, ...] = ()
    n_genes, n_types = 60, 30

    def __init__(self, number: int, n_cells: int) -> None:
        self.dataset_id = self.title = f"simulated-{number}"
        self._n_cells, self._number = n_cells, number
        genes = [f"ENSG{gene:011d}" for gene in range(self.n_genes)]
        self.var = pd.DataFrame({"feature_id": genes, "feature_name": genes, "feature_length": 1000})
        self.var["feature_type"] = "protein_coding"
        self.genes = GeneReport(in_file=self.n_genes, kept=self.n_genes)
        self.types = np.random.default_rng([number, 0]).integers(0, self.n_types, n_cells)
        obs = pd.DataFrame({name: default_label(name, self.organism) for name in LABEL_COLUMNS}, index=range(n_cells))
        obs["cell_type"] = [f"type {code}" for code in self.types]
        obs["tissue"] = obs["tissue_general"] = [f"tissue {code % 5}" for code in self.types]
        obs["donor_id"] = [f"donor {cell % 20}" for cell in range(n_cells)]
        obs["observation_joinid"] = [f"{number:03d}-{cell:07d}" for cell in range(n_cells)]
        self.obs = obs.astype(dict.fromkeys(LABEL_COLUMNS, "category")).assign(is_primary_data=True)
        self.kept_counts = np.ones(n_cells)

    def blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, raw counts int64 of at most `rows` cells x genes)."""
        return regroup(self._chunks(), rows)

    def protein_blocks(self, rows: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """No proteins."""
        return regroup((), rows)

    def _chunks(self) -> Iterator[sp.csr_matrix]:
        rates = np.random.default_rng(0).gamma(0.3, 2.0, (self.n_types, self.n_genes))
        for start in range(0, self._n_cells, 2**14):
            some = slice(start, min(start + 2**14, self._n_cells))
            counts = np.random.default_rng([self._number, 1, start]).poisson(rates[self.types[some]])
            yield sp.csr_matrix(counts)


def scale(folder: Path, n_cells: int) -> None:
    """Measure a comparison of two releases of many cells."""
    each, census = n_cells // 10, folder / "census"
    if not census.exists():
        build_census(census, [Simulated(number, each) for number in range(11)])
    few = f"soma_joinid < {min(20_000, n_cells)}"
    small = {
        "census": {"organism": "homo_sapiens", "obs_query": few, "obs_query_model": few},
        "hvg": {"top_n_hvg": 50},
        "anndata": {"batch_key": ["donor_id"]},
        "model": {"n_hidden": 64, "n_latent": 50, "n_layers": 1},
        "train": {"max_epochs": 3, "batch_size": 256},
        "training_plan": {"lr": 1e-3},
        "evaluate": {"batches": ["dataset_id"]},
    }
    for name in ("old", "new"):
        if not (place(folder, name) / "latent.npy").exists():
            run(folder, name, small, census)
    types = np.concatenate([Simulated(number, each).types for number in range(11)])
    plant(place(folder, "old"), np.arange(10 * each), types, seed=0)  # the first dataset is gone, the last is new
    plant(place(folder, "new"), np.arange(each, 11 * each), types, seed=1)
    start = time.monotonic()
    census_scvi(folder, "new", "compare-releases", "--force", f"compare_releases.old={place(folder, 'old')}")
    wall = time.monotonic() - start
    manifest = json.loads((place(folder, "new") / "comparison" / "manifest.json").read_text())
    done = manifest["stages"]["compare-releases"]
    peak, cpu = done["peak_memory_bytes"] / 1e9, done["cpu_seconds"]
    print(f"{done['counts']['shared']:,} of {n_cells:,} cells: {wall:.0f} s wall, {cpu:.0f} s CPU, {peak:.2f} GB")


def plant(directory: Path, joinids: npt.NDArray[np.int64], types: npt.NDArray[np.int64], *, seed: int) -> None:
    """Let a run have embedded these cells: at the positions of their types in 50 dimensions, with noise."""
    centers = np.random.default_rng(0).normal(size=(types.max() + 1, 50))
    noise = np.random.default_rng(seed + 1).normal(scale=0.7, size=(len(joinids), 50))
    files = {"latent.npy": (centers[types[joinids]] + noise).astype(np.float32), "latent-idx.npy": joinids}
    manifest = json.loads((directory / "manifest.json").read_text())
    record = manifest["stages"]["create-latent-update"]
    for file, values in files.items():
        np.save(directory / file, values)
    record["outputs"] |= identities(directory, files)
    record["counts"]["cells"] = len(joinids)
    record["fingerprint"]["config"]["census.obs_query"] = (
        f"soma_joinid >= {joinids[0]} and soma_joinid <= {joinids[-1]}"
    )
    (directory / "manifest.json").write_text(json.dumps(manifest))


def place(folder: Path, name: str) -> Path:
    """Run directory of a release."""
    return folder / name.replace(" ", "-").replace(",", "")


def run(folder: Path, name: str, config: dict[str, Any], census: Path) -> None:
    """Run the stages, unless they are done."""
    values = {**config, "output": {"directory": str(place(folder, name))}}
    values["census"] = {**values.get("census", {}), "uri": str(census)}
    place(folder, name).with_suffix(".yaml").write_text(yaml.safe_dump(values))
    for stage in STAGES:
        census_scvi(folder, name, stage)


def census_scvi(folder: Path, name: str, stage: str, *arguments: str) -> None:
    """A command with the config of a release."""
    command(stage, "--config", str(place(folder, name).with_suffix(".yaml")), *arguments)


def command(*arguments: str) -> None:
    """A command in a process of its own, with one thread."""
    code = "import sys; from census_scvi.cli import console; sys.exit(console(sys.argv[1:]))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, *arguments], env=environment, check=True)


if __name__ == "__main__":
    main()
