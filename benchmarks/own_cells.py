"""Label transfer to a new study: `Atlas.predict` compared with PCA and logistic regression.

    python benchmarks/own_cells.py --data FOLDER [--seeds 0 1 2] [--epochs 100]

FOLDER holds pbmc_multi_human.h5ad and gene_map_human.tsv.gz. Labels of blood cells are transferred in both directions:
from pbmc3k and FACS-sorted cells to Kang's cells, and the reverse. The query is a file with the genes that its study
measured. Models are trained with configs/blood.yaml, once on the reference alone and once on all studies.
docs/label-transfer.md has the results.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import numpy.typing as npt
import pandas as pd
import scanpy as sc
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from census_scvi.annotation.annotator import STUDY_COLUMNS
from census_scvi.annotation.held_out import HeldOut
from census_scvi.annotation.label_transfer import FOREST, NEIGHBORS, REGRESSION, LabelTransfer, Prediction
from census_scvi.atlas import Atlas
from census_scvi.cli import main as run_stage
from census_scvi.local_census.settings import load_build_config
from census_scvi.query.alignment import AlignedCells
from census_scvi.query.cells import QueryCells
from census_scvi.stages.build_census import build_from_config

CONFIGS = Path(__file__).parents[1] / "configs"
ORGANISM, LABELS = "homo_sapiens", "cell_type"
FACS, KANG = ("pbmc3k", "zheng_facs"), ("kang_GSE96583",)
DIRECTIONS = {"pbmc3k, FACS -> Kang": (FACS, KANG), "Kang -> pbmc3k, FACS": (KANG, FACS)}
COMPONENTS, RESAMPLES = 50, 1000


@dataclass(frozen=True)
class Case:
    """Reference and query in the same space: positions, labels and groups; `truth` are the labels of the query."""

    points: npt.NDArray[np.float32]
    labels: npt.NDArray[np.object_]
    groups: npt.NDArray[np.object_]
    query: npt.NDArray[np.float32]
    truth: npt.NDArray[np.object_]

    def transfer(self, without: str | None = None, method: str = NEIGHBORS) -> LabelTransfer:
        """The classifier of `Atlas.predict`; cells of the type `without` are excluded from the reference."""
        kept = self.labels != without
        return LabelTransfer(self.points[kept], self.labels[kept], self.groups[kept], method=method)

    def predict(self, method: str = NEIGHBORS) -> Prediction:
        """Predict labels of the query, as `Atlas.predict` does."""
        return self.transfer(method=method).predict(self.query)


def main() -> None:
    """Train, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of pbmc_multi_human.h5ad and the gene map")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="keep Census and models there, and take those that are there")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)).absolute()
        if not (folder / "census").exists():
            build = load_build_config(CONFIGS / "build-blood.yaml", data=arguments.data)
            build_from_config(build.model_copy(update={"uri": folder / "census"}))
        everything = ad.read_h5ad(arguments.data / "pbmc_multi_human.h5ad")
        for seed in arguments.seeds:
            train(folder, "joint", seed, arguments.epochs, (*FACS, *KANG))
            for direction, (reference, query) in DIRECTIONS.items():
                file = folder / "query.h5ad"
                measured(everything, query).write_h5ad(file)
                alone = train(folder, reference[0], seed, arguments.epochs, reference)
                cases = {
                    "scVI of the reference": scvi_case(folder, alone, file, reference),
                    "scVI of all studies": scvi_case(folder, folder / f"joint-{seed}", file, reference),
                }
                counts = counts_case(folder, alone, file, reference)
                cases["PCA of the reference"] = pca_case(counts)
                for name, case in cases.items():
                    found = case.predict()
                    row = {"direction": direction, "seed": seed, "who": name}
                    rows.append(row | agreement(case, found) | unknown(case, found))
                    if name.startswith("scVI"):
                        for method in (FOREST, REGRESSION):
                            other = agreement(case, case.predict(method=method))
                            rows.append({**row, "who": f"{name}, {method.replace('_', ' ')}"} | other)
                rows.append({"direction": direction, "seed": seed, **logistic(counts)})
                print(pd.DataFrame(rows).tail(8).to_string(), flush=True)
    print(report(pd.DataFrame(rows)))


def measured(everything: ad.AnnData, studies: tuple[str, ...]) -> ad.AnnData:
    """Labelled cells of some studies, with the genes that all of these studies measured."""
    genes = np.all([everything.var[f"measured_in_{study}"] for study in studies], axis=0)
    cells = everything.obs["dataset"].isin(studies) & (everything.obs["cell_type_coarse"] != "unknown")
    chosen = everything[cells.to_numpy(), genes]
    return ad.AnnData(chosen.X.copy(), obs=chosen.obs[["cell_type_coarse", "batch"]], var=chosen.var[[]])


def train(folder: Path, name: str, seed: int, epochs: int, studies: tuple[str, ...]) -> Path:
    """Train a model on some studies; return its run directory."""
    directory = folder / f"{name}-{seed}"
    settings = [
        f"census.uri={folder}/census",
        f"census.obs_query=dataset_id in {list(studies)}",
        f"output.directory={directory}",
        f"train.max_epochs={epochs}",
        f"seed={seed}",
    ]
    for stage in ("prepare", "train", "create-latent-update"):
        if run_stage(stage, ["--config", str(CONFIGS / "blood.yaml"), *settings]):
            raise SystemExit(f"{stage} failed; the line above says why")
    return directory


def scvi_case(folder: Path, run: Path, file: Path, studies: tuple[str, ...]) -> Case:
    """Reference and query in the latent space, as `Atlas` embeds them."""
    with Atlas.open(run, census=folder / "census") as atlas:
        mapped = atlas.embed(file, min_share=0.5)
        reference = atlas.reference(f"dataset_id in {list(studies)} and cell_type != 'unknown'", [LABELS])
    return Case(
        reference.obsm["scvi"],
        *labels_and_groups(reference.obs),
        mapped.obsm["X_scvi"],
        mapped.obs["cell_type_coarse"].astype(str).to_numpy(dtype=object),
    )


def counts_case(folder: Path, run: Path, file: Path, studies: tuple[str, ...]) -> Case:
    """The same cells as log-normalised counts, in those genes of the model that the query has."""
    with Atlas.open(run, census=folder / "census") as atlas, QueryCells(file) as cells:
        assert atlas.description is not None
        genes = atlas.description.genes
        aligned = AlignedCells(cells, genes, {}, ORGANISM, min_share=0.5)  # the file has Ensembl ids
        query = np.concatenate([block.toarray() for _, block in aligned.blocks(4096)])
        truth = cells.obs["cell_type_coarse"].astype(str).to_numpy(dtype=object)
    with cellxgene_census.open_soma(uri=f"{folder}/census") as root:
        found = cellxgene_census.get_anndata(
            root, ORGANISM, obs_value_filter=f"dataset_id in {list(studies)} and cell_type != 'unknown'"
        )
    found.var_names = found.var["feature_id"].astype(str)
    # Exclude genes that the query's study did not measure: they would only separate the studies.
    shared = ~np.isin(genes, aligned.report.missing)
    reference = found[:, genes].X.toarray()[:, shared]
    return Case(log_normalised(reference), *labels_and_groups(found.obs), log_normalised(query[:, shared]), truth)


def labels_and_groups(obs: pd.DataFrame) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.object_]]:
    """Cell type of each cell, and its dataset (or its donor, if there is only one dataset)."""
    groups = next(name for name in STUDY_COLUMNS if obs[name].nunique() > 1)
    return tuple(obs[name].astype(str).to_numpy(dtype=object) for name in (LABELS, groups))


def log_normalised(counts: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """log1p of counts scaled to 10,000 per cell."""
    cells = ad.AnnData(counts.astype(np.float32))
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return np.asarray(cells.X)


def pca_case(counts: Case) -> Case:
    """Fit a PCA on the reference and project the query onto it."""
    fitted = PCA(COMPONENTS, random_state=0).fit(counts.points)
    points, query = (fitted.transform(values).astype(np.float32) for values in (counts.points, counts.query))
    return Case(points, counts.labels, counts.groups, query, counts.truth)


def logistic(counts: Case) -> dict[str, object]:
    """Logistic regression on log-normalised counts."""
    fitted = LogisticRegression(max_iter=300, C=0.1).fit(counts.points, counts.labels.astype(str))
    shares = fitted.predict_proba(counts.query)
    named = fitted.classes_[shares.argmax(axis=1)].astype(object), shares.max(axis=1)
    return {"who": "logistic regression, log-normalised counts", **_agreement(counts, *named)}


def agreement(case: Case, found: Prediction) -> dict[str, float]:
    """`_agreement` of a prediction."""
    return _agreement(case, found.labels, found.probability)


def _agreement(case: Case, labels: npt.NDArray[np.object_], probability: npt.NDArray[np.floating]) -> dict[str, float]:
    """Accuracy on cell types of the reference, with interval; calibration error; risk at some coverages."""
    shared = np.isin(case.truth.astype(str), np.unique(case.labels.astype(str)))
    right = (case.truth == labels)[shared]
    drawn = np.random.default_rng(0).integers(0, len(right), (RESAMPLES, len(right)))
    low, high = np.quantile(right[drawn].mean(axis=1), [0.025, 0.975])
    score = HeldOut.of(case.truth[shared], (labels[shared], probability[shared]))
    risk = dict(zip(score.coverage.round(2), score.risk, strict=True))
    return {
        "accuracy": score.accuracy,
        "low": low,
        "high": high,
        "mean over types": score.mean_over_types,
        "calibration error": score.calibration_error,
        **{f"wrong among the most confident {share:.0%}": risk[share] for share in (0.25, 0.5, 0.75, 0.9)},
    }


def unknown(case: Case, found: Prediction) -> dict[str, float]:
    """Effect of `unknown`, and detection of types that are excluded from the reference."""
    shared = np.isin(case.truth.astype(str), np.unique(case.labels.astype(str)))
    right = (case.truth == found.labels)[shared]
    names = ("uncertainty", "improbability", "found", "kept", "found alone", "found, expected", "kept, expected")
    noticed = {name: [] for name in names}
    for label in np.unique(case.truth[shared].astype(str)):
        of_type = (case.truth == label)[shared]
        if of_type.sum() < 20:
            continue
        transfer = case.transfer(without=label)
        left_out, alone = transfer.predict(case.query[shared]), transfer.predict(case.query[shared][of_type])
        noticed["uncertainty"].append(roc_auc_score(of_type, left_out.uncertainty))
        noticed["improbability"].append(roc_auc_score(of_type, 1 - left_out.probability))
        noticed["found"].append(left_out.unknown[of_type].mean())
        noticed["kept"].append(1 - left_out.unknown[~of_type].mean())
        noticed["found alone"].append(alone.unknown.mean())
        noticed["found, expected"].append(transfer.bound.left_out_found)
        noticed["kept, expected"].append(transfer.bound.known_kept)
    return {
        "distance ratio": found.shift,
        "far": float(found.far),
        "unknown": found.unknown[shared].mean(),
        "accuracy of the rest": right[~found.unknown[shared]].mean(),
        **{f"excluded, {name}": float(np.mean(values)) for name, values in noticed.items()},
    }


def report(rows: pd.DataFrame) -> str:
    """Means over seeds, in Markdown."""
    lines = []
    for direction, some in rows.groupby("direction", sort=False):
        mean = some.drop(columns="direction").groupby("who", sort=False).mean().drop(columns="seed")
        spread = some.groupby("who", sort=False)["accuracy"].agg(["min", "max"])
        mean.insert(1, "over seeds", [f"{low:.3f}-{high:.3f}" for low, high in spread.to_numpy()])
        lines += [f"{direction}", "", "| | " + " | ".join(mean.columns) + " |", "|---" * (len(mean.columns) + 1) + "|"]
        for who, values in mean.iterrows():
            shown = [value if isinstance(value, str) else "" if pd.isna(value) else f"{value:.3f}" for value in values]
            lines.append(f"| {who} | " + " | ".join(shown) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
