"""Transfer of cell types from two studies to a third by nearest neighbours, in the scVI latent and in a PCA.

    python benchmarks/label_transfer.py --data FOLDER [--seeds 0 1 2] [--picture docs/blood-umap.png]

FOLDER holds pbmc_multi_human.h5ad and gene_map_human.tsv.gz. For each seed, the script builds the Census and runs the
three stages in a temporary folder, with configs/build-blood.yaml and configs/blood.yaml. docs/blood.md has the results.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import numpy.typing as npt
import pandas as pd
import scanpy as sc
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, recall_score
from sklearn.neighbors import KNeighborsClassifier

from census_scvi.census.genes import read_genes
from census_scvi.cli import main as run_stage
from census_scvi.local_census.settings import load_build_config
from census_scvi.pictures.umap import draw_before_and_after
from census_scvi.settings import Config, load_config
from census_scvi.stages.build_census import build_from_config

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = ("prepare", "train", "create-latent-update")
THREADS = torch.get_num_threads()
REFERENCE = ("pbmc3k", "zheng_facs")
QUERY = ("kang_GSE96583",)
NEIGHBORS = 15
COMPONENTS = 50
ROWS = {
    "scvi": "scVI latent",
    "pca": f"PCA-{COMPONENTS}, library size from the selected genes",
    "pca_all": f"PCA-{COMPONENTS}, library size from all genes",
    "shuffled": "scVI latent, labels of the reference shuffled",
    "majority": "always the most frequent label of the reference",
}


@dataclass(frozen=True)
class Transfer:
    """Reference and query cells of a label transfer; labels are str, masks bool, all (cells,)."""

    labels: npt.NDArray[np.object_]
    reference: npt.NDArray[np.bool_]
    query: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, obs: pd.DataFrame) -> Transfer:
        """Use labelled cells of the reference studies, and query cells whose label is in the reference."""
        labels = obs["cell_type"].astype(str).to_numpy(dtype=object)
        reference = (obs["dataset_id"].isin(REFERENCE) & (labels != "unknown")).to_numpy()
        known = np.isin(labels.astype(str), np.unique(labels[reference].astype(str)))
        return cls(labels, reference, obs["dataset_id"].isin(QUERY).to_numpy() & known)

    def score(self, space: npt.NDArray[np.float32], labels: npt.NDArray[np.object_] | None = None) -> dict[str, float]:
        """Accuracy, overall and averaged over cell types, of nearest-neighbour transfer in a space (cells, dims)."""
        known = self.labels[self.reference] if labels is None else labels
        classifier = KNeighborsClassifier(NEIGHBORS).fit(space[self.reference], known.astype(str))
        return self.compare(classifier.predict(space[self.query]))

    def compare(self, predicted: npt.NDArray[np.str_]) -> dict[str, float]:
        """Accuracy of labels for the query cells."""
        true = self.labels[self.query].astype(str)
        by_type = recall_score(true, predicted, labels=np.unique(true), average="macro")
        return {"accuracy": accuracy_score(true, predicted), "balanced": by_type}


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of pbmc_multi_human.h5ad and the gene map")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default: 0 1 2)")
    parser.add_argument("--picture", type=Path, help="write the UMAPs of the first seed there (PNG)")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings that win over the config")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        census = Path(folder) / "census"
        build = load_build_config(CONFIGS / "build-blood.yaml", data=arguments.data)
        build_from_config(build.model_copy(update={"uri": census}))
        runs = []
        for seed in arguments.seeds:
            own = {"census.uri": census, "output.directory": f"{folder}/{seed}", "seed": seed}
            overrides = arguments.settings + [f"{key}={value}" for key, value in own.items()]
            runs.append(one_run(load_config(CONFIGS / "blood.yaml", overrides), overrides))
            print(runs[-1].to_string(), file=sys.stderr, flush=True)
            if arguments.picture and seed == arguments.seeds[0]:
                draw(load_config(CONFIGS / "blood.yaml", overrides), arguments.picture)
    print(report(runs))


def one_run(config: Config, overrides: list[str]) -> pd.Series:
    """Run the three stages and score their results: a Series indexed by (row, measure)."""
    seconds = {stage: timed_stage(stage, overrides) for stage in STAGES}
    cells, latent = embedded_cells(config)
    transfer = Transfer.of(cells.obs)
    scores = {name: transfer.score(space) for name, space in spaces(cells, config).items()}
    scores["scvi"] = transfer.score(latent)
    shuffled = np.random.default_rng(config.seed).permutation(transfer.labels[transfer.reference])
    scores["shuffled"] = transfer.score(latent, shuffled)
    majority = pd.Series(transfer.labels[transfer.reference]).mode()[0]
    scores["majority"] = transfer.compare(np.array([majority] * int(transfer.query.sum())))
    values = {(row, measure): value for row, measures in scores.items() for measure, value in measures.items()}
    values |= {("train", "wall"): seconds["train"][0], ("train", "cpu"): seconds["train"][1]}
    values |= {("cells", "reference"): transfer.reference.sum(), ("cells", "query"): transfer.query.sum()}
    return pd.Series(values, name=config.seed)


def timed_stage(stage: str, overrides: list[str]) -> tuple[float, float]:
    """Run a stage as its script does; return wall and CPU seconds."""
    torch.set_num_threads(THREADS)  # scanpy's compiled functions reset it to the number of cores
    wall, cpu = time.perf_counter(), time.process_time()
    if run_stage(stage, ["--config", str(CONFIGS / "blood.yaml"), *overrides]):
        raise SystemExit(f"{stage} failed; the line above says why")
    return time.perf_counter() - wall, time.process_time() - cpu


def embedded_cells(config: Config) -> tuple[ad.AnnData, npt.NDArray[np.float32]]:
    """Raw counts of all genes of the embedded cells from the Census, and their latent in the same order."""
    names = config.artifacts
    joinids = np.load(config.directory / names.latent_joinids)
    with cellxgene_census.open_soma(uri=config.census.uri) as census:
        cells = cellxgene_census.get_anndata(census, config.census.organism, obs_coords=joinids)
    cells.var_names = cells.var["feature_id"].astype(str)
    if not np.array_equal(cells.obs["soma_joinid"], joinids):
        raise RuntimeError("the Census gave other cells than the latent has")
    return cells, np.load(config.directory / names.latent)


def spaces(cells: ad.AnnData, config: Config) -> dict[str, npt.NDArray[np.float32]]:
    """PCAs of log-normalised counts of scVI's genes, fitted on all cells.

    Most tutorials scale each cell by its counts in all genes. The model sees only the counts in the selected genes.
    Neither scaling is always better, so both are shown.
    """
    genes = read_genes(config.directory / config.artifacts.genes)
    selected = ad.AnnData(cells[:, genes].X.copy())
    everything = ad.AnnData(cells.X.copy(), var=pd.DataFrame(index=cells.var_names))
    for counts in (selected, everything):
        sc.pp.normalize_total(counts, target_sum=1e4)
        sc.pp.log1p(counts)
    return {"pca": pca(selected), "pca_all": pca(everything[:, genes].copy())}


def pca(cells: ad.AnnData) -> npt.NDArray[np.float32]:
    """Principal components, float32 (cells, 50)."""
    sc.pp.pca(cells, n_comps=COMPONENTS, random_state=0)
    return np.asarray(cells.obsm["X_pca"], dtype=np.float32)


def draw(config: Config, path: Path) -> None:
    """Plot the cells before and after integration, coloured by cell type and by donor (the batches of blood.yaml)."""
    cells, latent = embedded_cells(config)
    genes = read_genes(config.directory / config.artifacts.genes)
    chosen = cells[:, genes].copy()
    chosen.obs["batch"] = chosen.obs["donor_id"]
    draw_before_and_after(chosen, latent, path, seed=config.seed)
    # A palette reduces the file to a quarter. Unlike the default, this method keeps the colours of rare cell types.
    picture = Image.open(path).convert("RGB").quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


def report(runs: list[pd.Series]) -> str:
    """Markdown table of the results, and the setup of the measurement."""
    table = pd.DataFrame(runs)
    seeds = list(table.index)
    header = ["15-nearest-neighbour transfer", *(f"seed {seed}" for seed in seeds), "mean (range)", "mean by cell type"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row, title in ROWS.items():
        values = table[(row, "accuracy")]
        spread = f"{values.mean():.3f} ({values.min():.3f}-{values.max():.3f})"
        balanced = f"{table[(row, 'balanced')].mean():.3f}"
        lines.append("| " + " | ".join([title, *(f"{value:.3f}" for value in values), spread, balanced]) + " |")
    first = table.iloc[0]
    wall, cpu = (", ".join(f"{value:.0f}" for value in table[("train", clock)]) for clock in ("wall", "cpu"))
    lines += [
        "",
        f"{first[('cells', 'reference')]:,.0f} reference cells, {first[('cells', 'query')]:,.0f} query cells",
        f"training: {wall} s; CPU: {cpu} s; {THREADS} thread(s), {device()}",
        f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("scvi-tools", "torch", "scanpy", "scikit-learn", "numpy")),
    ]
    return "\n".join(lines)


def device() -> str:
    """Name of the device that the model was trained on."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
