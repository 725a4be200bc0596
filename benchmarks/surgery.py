"""Query surgery: does it matter how the batches of a query are trained? Three kinds of models, several seeds.

    python benchmarks/surgery.py --data FOLDER --work FOLDER --results FILE.csv [--cases blood-SCVI ...] [--seeds 0 1 2]
        [--epochs 100] [--query-epochs 100] [--genes 1000]

FOLDER of --data holds pbmc_multi_human.h5ad, citeseq_pbmc_2batch_human.h5ad and gene_map_human.tsv.gz. The reference
of `blood-SCVI` and `blood-SCANVI` is pbmc3k and FACS-sorted blood, the query Kang et al.'s two conditions. The
reference of `citeseq-TOTALVI` is 10x' 10k cells in two batches, the query 5k cells in two batches, of which one is
thinned to half its counts and lacks five proteins; labels by gates on marker proteins. `citeseq-TOTALVI-forum` trains
the query with adversarial loss 0 and frozen dropout. `simulated-TOTALVI` has 20,000 cells of the demo Census: blood in
two batches is the reference, lung in two batches the query, of which one is thinned to half its counts and lacks
five proteins; minibatches have 512 instead of 128 cells.

Each case goes through build-census, prepare, train and create-latent-update, then `Atlas.compare_mappings`. Rows are
appended to FILE.csv as they are measured; those that it has are not measured again. docs/surgery.md has the results.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import yaml

from census_scvi import Atlas
from census_scvi.cli import main as run_command
from census_scvi.local_census.demo.cells import DemoSource, demo_sources

PRESET = Path(__file__).parents[1] / "configs" / "surgery-reference.yaml"
SIMULATED_CELLS = 20_000
MISSING = ["CD25", "CD127", "PD-1", "TIGIT", "CD15"]
FORUM = {"scale_adversarial_loss": 0.0, "freeze_dropout": True}


@dataclass(frozen=True)
class Case:
    """A reference and a query of the same labels.

    Attributes
    ----------
    kind
        Kind of model.
    reference, query
        Raw counts (cells, genes); obs has `study` (reference), `sample` (query) and `label`; obsm may have proteins.
    arguments
        `surgery_training.arguments`.
    batch_size
        Cells per minibatch, of reference and query.
    """

    kind: str
    reference: ad.AnnData
    query: ad.AnnData
    arguments: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 128


def blood(kind: str) -> Callable[[Path, int], Case]:
    """Kang et al. on pbmc3k and FACS-sorted blood."""

    def read(data: Path, seed: int) -> Case:
        cells = ad.read_h5ad(data / "pbmc_multi_human.h5ad")
        cells.obs["label"] = cells.obs["cell_type_coarse"].astype(str)
        cells.obs["study"] = cells.obs["sample"] = cells.obs["batch"].astype(str)
        of_query = cells.obs["study"].str.startswith("kang").to_numpy()
        of_reference = cells.obs["study"].isin(["pbmc3k", "zheng_facs"]).to_numpy()
        return Case(kind, cells[of_reference].copy(), cells[of_query].copy())

    return read


def citeseq(arguments: Mapping[str, Any]) -> Callable[[Path, int], Case]:
    """10x' 5k cells on their 10k cells, two batches each."""

    def read(data: Path, seed: int) -> Case:
        numbers = np.random.default_rng(seed)
        cells = ad.read_h5ad(data / "citeseq_pbmc_2batch_human.h5ad")
        cells.obs["label"] = gated(cells.obsm["protein_expression"])
        half = np.where(numbers.random(cells.n_obs) < 0.5, "a", "b")
        of_reference = (cells.obs["batch"] == "pbmc_10k_protein_v3").to_numpy()
        cells.obs["study"], cells.obs["sample"] = np.char.add("10k-", half), np.char.add("5k-", half)
        query = cells[~of_reference].copy()
        thin(query, (query.obs["sample"] == "5k-b").to_numpy(), MISSING, numbers)
        return Case("TOTALVI", cells[of_reference].copy(), query, arguments)

    return read


def thin(cells: ad.AnnData, rows: np.ndarray, missing: list[str], numbers: np.random.Generator) -> None:
    """Leave half the counts of some cells, and none of the proteins in `missing`."""
    counts = sp.csr_matrix(cells.X)
    of_rows = np.repeat(rows, np.diff(counts.indptr))
    counts.data[of_rows] = numbers.binomial(counts.data[of_rows].astype(int), 0.5)
    cells.X = counts
    proteins = cells.obsm["protein_expression"].copy()
    proteins.loc[rows] = numbers.binomial(proteins.loc[rows].astype(int), 0.5)
    proteins.loc[rows, missing] = 0
    cells.obsm["protein_expression"] = proteins


def gated(proteins: pd.DataFrame) -> np.ndarray:
    """Labels by gates on log(1 + counts) of marker proteins."""
    high = np.log1p(proteins.astype(float))
    t_cell = high["CD3"] > 5
    labels = np.full(len(proteins), "unknown", dtype=object)
    labels[t_cell & (high["CD4"] > 5) & (high["CD8a"] < 5)] = "CD4 T cell"
    labels[t_cell & (high["CD8a"] > 5) & (high["CD4"] < 5)] = "CD8 T cell"
    labels[~t_cell & (high["CD19"] > 4)] = "B cell"
    labels[~t_cell & (high["CD56"] > 4) & (high["CD14"] < 5)] = "NK cell"
    labels[~t_cell & (high["CD14"] > 5.5)] = "monocyte"
    return labels


def simulated(data: Path, seed: int) -> Case:
    """The lung of the demo Census, which has cell types of its own and fewer proteins, on its blood."""
    n_cells = sum(len(source.obs) for source in _with_proteins(seed, 1.0))
    blood, lung = map(_of_source, _with_proteins(seed, SIMULATED_CELLS / n_cells))
    blood.obs["study"] = np.char.add("blood-", _halves(blood))
    lung.obs["sample"] = np.char.add("lung-", _halves(lung))
    thinned = (lung.obs["sample"] == "lung-b").to_numpy()
    thin(lung, thinned, list(lung.obsm["protein_expression"].columns[-5:]), np.random.default_rng(seed))
    return Case("TOTALVI", blood, lung, batch_size=512)


def _with_proteins(seed: int, scale: float) -> list[DemoSource]:
    sources = demo_sources(seed, scale, 2000, proteins=True)
    return [source for source in sources if source.proteins and source.organism == "homo_sapiens"]


def _halves(cells: ad.AnnData) -> np.ndarray:
    """Two batches of donors: `a` and `b`."""
    return np.where(cells.obs["donor_id"].cat.codes % 2 == 0, "a", "b")


def _of_source(source: DemoSource) -> ad.AnnData:
    counts = sp.vstack([block for _, block in source.blocks(4096)], format="csr").astype(np.float32)
    proteins = sp.vstack([block for _, block in source.protein_blocks(4096)]).toarray()
    obs = source.obs.reset_index(drop=True)
    obs.index = [f"{source.dataset_id}-{i}" for i in range(len(obs))]
    obs["label"] = obs["cell_type"].astype(str)
    cells = ad.AnnData(counts, obs=obs, var=source.var.set_index("feature_id"))
    cells.obsm["protein_expression"] = pd.DataFrame(proteins, obs.index, source.proteins)
    return cells


CASES: dict[str, Callable[[Path, int], Case]] = {
    "blood-SCVI": blood("SCVI"),
    "blood-SCANVI": blood("SCANVI"),
    "citeseq-TOTALVI": citeseq({}),
    "citeseq-TOTALVI-forum": citeseq(FORUM),
    "simulated-TOTALVI": simulated,
}


def reference_of(case: Case, folder: Path, data: Path, options: argparse.Namespace, seed: int) -> Path:
    """The run directory of the trained reference."""
    run = folder / "run"
    if (run / "latent.npy").exists():
        return run
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    case.reference.write_h5ad(folder / "reference.h5ad")
    build = {
        "uri": str(folder / "census"),
        "data": str(folder),
        "genes": {"map": {"homo_sapiens": str((data / "gene_map_human.tsv.gz").absolute())}},
        "datasets": [
            {
                "file": "reference.h5ad",
                "dataset_id": {"column": "study"},
                "organism": "homo_sapiens",
                "obs": {"cell_type": "label"},
            }
        ],
    }
    proteins = case.kind == "TOTALVI"
    config = {
        "extends": str(PRESET),
        "census": {"uri": str(folder / "census"), "organism": "homo_sapiens", "obs_query_model": None},
        "hvg": {"top_n_hvg": options.genes, "hvg_batch": ["dataset_id"]},
        "anndata": {
            "labels_key": "cell_type" if case.kind == "SCANVI" else None,
            "protein_measurement": "protein" if proteins else None,
        },
        "model": {"kind": case.kind, "n_latent": 20 if proteins else 10},
        "train": {"max_epochs": options.epochs, "batch_size": case.batch_size, "accelerator": "cpu"},
        "training_plan": {} if proteins else {"n_epochs_kl_warmup": options.epochs // 2},
        "latent": {"minified": "none"},
        "output": {"directory": str(run)},
        "seed": seed,
    }
    (folder / "build.yaml").write_text(yaml.safe_dump(build))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for stage, arguments in (
        ("build-census", [str(folder / "build.yaml")]),
        *((stage, ["--config", str(folder / "config.yaml")]) for stage in ("prepare", "train", "create-latent-update")),
    ):
        if run_command(stage, arguments):
            raise SystemExit(f"{stage} failed")
    return run


def measure(name: str, seed: int, options: argparse.Namespace) -> pd.DataFrame:
    """The table of a comparison, with the case and the seed; the rows are ways of mapping."""
    case = CASES[name](options.data, seed)
    run = reference_of(case, options.work / f"{name}-{seed}", options.data, options, seed)
    training = {
        "max_epochs": options.query_epochs,
        "batch_size": case.batch_size,
        "arguments": dict(case.arguments),
    }
    with Atlas.open(run) as atlas:
        compared = atlas.compare_mappings(
            case.query, "sample", labels="cell_type", truth="label", training=training, seed=seed
        )
    print(f"{name}, seed {seed}: {compared.recommendation}", flush=True)
    table = compared.table.reset_index()
    table.insert(0, "case", name)
    table.insert(1, "seed", seed)
    return table


def main() -> None:
    """Measure what is missing, and print means and ranges over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for Censuses and run directories")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=100, help="of the reference")
    parser.add_argument("--query-epochs", type=int, default=100)
    parser.add_argument("--genes", type=int, default=1000)
    options = parser.parse_args()
    for name in options.cases:
        for seed in options.seeds:
            known = pd.read_csv(options.results) if options.results.exists() else pd.DataFrame(columns=["case", "seed"])
            if ((known["case"] == name) & (known["seed"] == seed)).any():
                continue
            measured = measure(name, seed, options)
            pd.concat([known, measured]).to_csv(options.results, index=False)
    show(pd.read_csv(options.results))


SHOWN = {
    "distance_mean": "distance to joint",
    "neighbor_overlap": "neighbors in common",
    "cluster_agreement": "clusters (ARI)",
    "accuracy_neighbors": "accuracy: neighbors",
    "accuracy_random_forest": "random forest",
    "accuracy_mlp": "perceptron",
    "mixing": "mixing",
    "steps": "steps",
}


def show(table: pd.DataFrame) -> None:
    """Print a Markdown table of each case: mean over the seeds, and the range."""
    for case, rows in table.groupby("case", sort=False):
        moved, batch_by_batch = rows["moved"].max(), rows["batch_by_batch"].max()
        print(f"\n{case}, {rows['seed'].nunique()} seeds; largest change of the reference {moved:.1g}, of the latent")
        print(f"embedded batch by batch {batch_by_batch:.1g}\n")
        print("| way | " + " | ".join(SHOWN.values()) + " |")
        print("|---" * (len(SHOWN) + 1) + "|")
        rows = rows.assign(way=rows["way"].str.replace(r"^joint, seed \d+$", "joint, other seeds", regex=True))
        for way, group in rows.groupby("way", sort=False):
            print(f"| {way} | " + " | ".join(ranged(name, group[name]) for name in SHOWN) + " |")


def ranged(name: str, values: pd.Series) -> str:
    """Mean of a column, and its range; the number of steps alone."""
    if name == "steps":
        return f"{values.mean():,.0f}"
    digits = 2 if name == "distance_mean" else 3
    least, most = (f"{value:.{digits}f}".lstrip("0") or "0" for value in (values.min(), values.max()))
    mean = f"{values.mean():.{digits}f}".lstrip("0")
    return mean if least == most else f"{mean} ({least}-{most})"


if __name__ == "__main__":
    main()
