"""Cell type annotation across studies: accuracy of all methods, and cells of types that the reference lacks.

    python benchmarks/annotation.py --data FOLDER --results FILE.csv [--tasks forward backward donor1 donor2 simulated]
        [--seeds 0 1 2] [--methods consensus fast ...] [--parts accuracy unknown frequent]
    python benchmarks/annotation.py --open-problems FOLDER [--methods consensus fast ...]

FOLDER of the first form holds pbmc_multi_human.h5ad and pancreas_baron_mouse.h5ad. `forward` annotates Kang et al. with
pbmc3k and FACS-sorted blood as the reference, `backward` the reverse, `donor1` mouse 2 from mouse 1 and `donor2` the
reverse; `simulated` annotates one dataset of the demo Census from the others. Rows are appended to FILE.csv as they are
measured, those that it has are not measured again, and tables over the seeds are printed from it. FOLDER of the second
form is a task of OpenProblems' label projection: train.h5ad, test.h5ad and solution.h5ad, with raw counts in
layers["counts"] and the columns `label` and `batch` in obs. docs/annotation.md has the results.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from sklearn.metrics import f1_score, roc_auc_score

from census_scvi.annotation.annotate import FittedMethod
from census_scvi.annotation.methods import METHODS, create, members_of
from census_scvi.annotation.protocol import Annotation, Cells
from census_scvi.annotation.validation.held_out import HeldOut
from census_scvi.local_census.demo.cells import demo_sources

GENES, FEWEST, FREQUENT = 2000, {"blood": 50, "pancreas": 10}, 0.6
ALL = [name for name in METHODS if name != "neighbors"]  # there is no atlas whose model could embed the cells
BLOOD = {"forward": ("pbmc3k", "zheng_facs"), "backward": ("kang_CTRL", "kang_STIM")}
DONORS = {"donor1": "mouse1", "donor2": "mouse2"}
SIMULATED = "simulated"
TASKS = [*BLOOD, *DONORS, SIMULATED]
PARTS = ["accuracy", "unknown", "frequent"]
ALIKE = ("CD4 T cell", "CD8 T cell")  # the border between them differs between the studies' own labels
# Types that are made 60 % of the query: these, or else the three most frequent ones.
MADE_FREQUENT = ("B cell", "CD14 monocyte", "NK cell")
REPEATS = 500
ONE_BATCH = " (one batch)"
COLUMNS = [
    "task", "part", "seed", "method", "type", "accuracy", "interval", "macro F1", "calibration", "wrong at .7", "cells",
    "AUROC", "found at 95 % kept", "kept", "found", "expected kept", "expected found", "far", "CPU s",
]  # fmt: skip

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Data:
    """Labelled cells of two sides, any of which can be the reference."""

    cells: ad.AnnData
    labels: npt.NDArray[np.object_]
    batch: npt.NDArray[np.object_]
    reference: Rows
    query: Rows
    fewest: int

    def task(self, reference: Rows, query: Rows) -> tuple[Cells, npt.NDArray[np.object_], npt.NDArray[np.object_]]:
        """Cells with the reference's most variable genes, and labels of reference and query."""
        genes = variable_genes(self.cells[reference], self.batch[reference])
        rows = np.append(reference, query)
        counts = sp.csr_matrix(self.cells[rows][:, genes].X, dtype=np.float32)
        return Cells(counts, self.batch[rows], len(reference), genes), self.labels[reference], self.labels[query]


def blood(folder: Path, direction: str) -> Data:
    """pbmc3k and FACS-sorted blood, and Kang et al., with the genes that all three measured."""
    cells = ad.read_h5ad(folder / "pbmc_multi_human.h5ad")
    measured = [name for name in cells.var if name.startswith("measured_in") and "frozen" not in name]
    cells = cells[:, cells.var[measured].to_numpy(bool).all(axis=1)]
    labels = cells.obs["cell_type_coarse"].astype(str).to_numpy(dtype=object)
    batch = cells.obs["batch"].astype(str).to_numpy(dtype=object)
    known = labels != "unknown"
    one, other = (np.flatnonzero(np.isin(batch.astype(str), names) & known) for names in BLOOD.values())
    return Data(cells, labels, batch, *((one, other) if direction == "forward" else (other, one)), FEWEST["blood"])


def pancreas(folder: Path, donor: str) -> Data:
    """Two mice; their libraries are the batches."""
    cells = ad.read_h5ad(folder / "pancreas_baron_mouse.h5ad")
    labels, batch, donors = (
        cells.obs[name].astype(str).to_numpy(dtype=object) for name in ("cell_type", "library", "donor")
    )
    mine = donors == sorted(set(donors))[list(DONORS).index(donor)]
    return Data(cells, labels, batch, np.flatnonzero(mine), np.flatnonzero(~mine), FEWEST["pancreas"])


def simulated_studies(seed: int) -> Data:
    """The human cells of the demo Census: the last dataset is the query, with its donors as batches."""
    sources = [source for source in demo_sources(seed, n_genes=GENES, depth=0.5) if source.organism == "homo_sapiens"]
    parts = []
    for source in sources:
        counts = sp.vstack([block for _, block in source.blocks(4096)], format="csr").astype(np.float32)
        part = ad.AnnData(counts, obs=source.obs.astype(str), var=pd.DataFrame(index=source.var["feature_id"]))
        part.obs["dataset"] = source.dataset_id
        parts.append(part[(part.obs["is_primary_data"] == "True").to_numpy()])
    cells = ad.concat(parts, index_unique="-", keys=range(len(parts)))
    labels, batch, dataset = (cells.obs[name].to_numpy(dtype=object) for name in ("cell_type", "donor_id", "dataset"))
    query = dataset == sources[-1].dataset_id
    return Data(cells, labels, batch, np.flatnonzero(~query), np.flatnonzero(query), FEWEST["pancreas"])


def open_problems(folder: Path) -> Data:
    """The layout of OpenProblems' label projection."""
    train, test, solution = (ad.read_h5ad(folder / f"{name}.h5ad") for name in ("train", "test", "solution"))
    cells = ad.concat([train, test], label="side", keys=["train", "test"], index_unique="-")
    cells.X = cells.layers["counts"]
    labels = np.append(train.obs["label"].astype(str), solution.obs.loc[test.obs_names, "label"].astype(str))
    rows = np.arange(len(cells))
    batch = cells.obs["batch"].astype(str).to_numpy(dtype=object)
    return Data(cells, labels.astype(object), batch, rows[: len(train)], rows[len(train) :], FEWEST["blood"])


def variable_genes(cells: ad.AnnData, batch: npt.NDArray[np.object_]) -> list[str]:
    """Most variable genes of the reference (seurat_v3, ranked by batch)."""
    table = ad.AnnData(sp.csr_matrix(cells.X), var=pd.DataFrame(index=cells.var_names))
    table.obs["batch"] = pd.Categorical(batch.astype(str))
    sc.pp.filter_genes(table, min_cells=3)
    if table.n_vars <= GENES:
        return list(table.var_names)
    found = sc.pp.highly_variable_genes(table, flavor="seurat_v3", n_top_genes=GENES, batch_key="batch", inplace=False)
    return [str(name) for name in table.var_names[found["highly_variable"].to_numpy()]]


def accuracy(data: Data, methods: list[str], seed: int, *, one_batch: bool = False) -> Iterator[dict[str, object]]:
    """Accuracy, macro F1 and CPU-seconds of each method, for types that both sides have."""
    cells, labels, truth = data.task(data.reference, data.query)
    if one_batch:
        batch = np.append(cells.batch[cells.reference], np.full(len(truth), "query", dtype=object))
        cells = Cells(cells.counts, batch, cells.n_reference, cells.genes)
    classes, codes = np.unique(labels.astype(str), return_inverse=True)
    shared = np.isin(truth.astype(str), classes)
    units = {"batch": cells.batch[cells.reference]}
    for method in methods:
        started = time.process_time()
        found = None
        if len(members_of(method)) > 1:
            found = FittedMethod(cells, method, compare=(), batches_known=not one_batch, seed=seed).annotate(
                labels, units
            )
            probability = found.probability
        else:
            annotator = create(method, seed=seed)
            annotator.fit(cells)
            probability = annotator.predict(cells.reference, codes, len(classes), cells.query)
        seconds = time.process_time() - started
        named = classes[probability.argmax(axis=1)].astype(object)
        right = named[shared] == truth[shared]
        chance = np.random.default_rng(0)
        again = [right[chance.integers(0, len(right), len(right))].mean() for _ in range(REPEATS)]
        quality = HeldOut.of(truth[shared], (named[shared], probability[shared].max(axis=1)))
        certain = probability.max(axis=1)[shared] >= 0.7
        yield {
            "method": method + ONE_BATCH * one_batch,
            "accuracy": right.mean(),
            "interval": f"{np.quantile(again, 0.025):.3f}-{np.quantile(again, 0.975):.3f}",
            "macro F1": f1_score(
                truth[shared].astype(str),
                named[shared].astype(str),
                labels=np.unique(truth[shared].astype(str)),
                average="macro",
            ),
            "calibration": quality.calibration_error,
            "wrong at .7": (certain & ~right).mean(),
            "CPU s": seconds,
        } | ({} if found is None else state(found))


def permuted(data: Data, seed: int) -> float:
    """Accuracy of `fast` with permuted labels of the reference."""
    cells, labels, truth = data.task(data.reference, data.query)
    shuffled = np.random.default_rng(seed).permutation(labels)
    found = FittedMethod(cells, "fast", compare=(), seed=seed).annotate(
        shuffled, {"batch": cells.batch[cells.reference]}
    )
    return float((found.labels == truth).mean())


def state(found: Annotation) -> dict[str, object]:
    """Batches with a warning."""
    return {"far": sum(batch["far"] for batch in found.facts["batches"].values())}


def excluded(
    data: Data, method: str, seed: int, share: float | None, done: Collection[str] = ()
) -> Iterator[dict[str, object]]:
    """Types of the query are excluded from the reference in turn: known cells kept, missing cells found."""
    truth = data.labels[data.query]
    for name in excluded_types(data, frequent=share is not None):
        absent = " (absent)" if name not in data.labels[data.reference] else ""
        if name + absent in done:
            continue
        numbers = np.random.default_rng(seed)
        query = data.query if share is None else data.query[thinned(truth == name, share, numbers)]
        reference = data.reference[data.labels[data.reference] != name]
        cells, labels, of_query = data.task(reference, query)
        started = time.process_time()
        found = FittedMethod(cells, method, compare=("pca",), seed=seed).annotate(
            labels, {"batch": cells.batch[cells.reference]}
        )
        known, missing = np.isin(of_query.astype(str), found.classes), of_query == name
        compared = known | missing
        limit = np.quantile(found.uncertainty[known], 0.95)
        yield {
            "type": name + absent,
            "cells": int(missing.sum()),
            "AUROC": roc_auc_score(missing[compared], found.uncertainty[compared]),
            "found at 95 % kept": (found.uncertainty[missing] > limit).mean(),
            "kept": (~found.unknown[known]).mean(),
            "found": found.unknown[missing].mean(),
            "expected kept": found.facts["known_kept"],
            "expected found": found.facts["left_out_found" if share is None else "frequent_left_out_found"],
            **state(found),
            "CPU s": time.process_time() - started,
        }


def excluded_types(data: Data, *, frequent: bool) -> list[str]:
    """Types of the query with enough cells; of those that the reference has, the ones to be made frequent."""
    names, sizes = np.unique(data.labels[data.query].astype(str), return_counts=True)
    if not frequent:
        return list(names[sizes >= data.fewest])
    known = [name for name in names[np.argsort(-sizes)] if name in data.labels[data.reference]]
    return list(MADE_FREQUENT) if set(MADE_FREQUENT) <= set(known) else known[:3]


def thinned(mine: npt.NDArray[np.bool_], share: float, numbers: np.random.Generator) -> Rows:
    """Positions of cells such that one type has a share of them."""
    members, others = np.flatnonzero(mine), np.flatnonzero(~mine)
    n_others = round(len(members) * (1 - share) / share)
    if n_others > len(others):
        members = numbers.choice(members, round(len(others) * share / (1 - share)), replace=False)
        n_others = len(others)
    return np.sort(np.append(members, numbers.choice(others, n_others, replace=False)))


def measure(data: Data, seed: int, part: str, methods: list[str], done: set[str]) -> Iterator[dict[str, object]]:
    """Rows of a part that are not done."""
    if part == "accuracy":
        todo = [method for method in methods if method not in done]
        yield from accuracy(data, todo, seed)
        recipes = [method for method in methods if len(members_of(method)) > 1]
        yield from accuracy(data, [m for m in recipes if m + ONE_BATCH not in done], seed, one_batch=True)
        if "permuted labels" not in done:
            yield {"method": "permuted labels", "accuracy": permuted(data, seed)}
    else:
        yield from excluded(data, "consensus", seed, None if part == "unknown" else FREQUENT, done)


def summary(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Title and table of each part of each task: means over seeds, and of accuracy the range."""
    for (task, part), found in rows.groupby(["task", "part"], sort=False):
        found = found.dropna(axis=1, how="all").drop(columns=["task", "part"])
        name = "method" if part == "accuracy" else "type"
        n_seeds = found["seed"].nunique()
        table = found.drop(columns="seed").groupby(name, sort=False).mean(numeric_only=True).reset_index()
        if part == "accuracy":
            of_method = found.groupby(name, sort=False)["accuracy"]
            spans = [f"{low:.3f}-{high:.3f}" for low, high in zip(of_method.min(), of_method.max(), strict=True)]
            table.insert(2, "seeds", spans)
            intervals = found[found["seed"] == found["seed"].min()].set_index(name)["interval"]
            table.insert(
                3, "interval", ["" if pd.isna(each := intervals.get(method)) else each for method in table[name]]
            )
        else:
            table = with_means(table)
        yield f"{task}: {part}, mean of {n_seeds} seed{'s' * (n_seeds > 1)}", table


def with_means(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a row of means, and one without the two types that the labels blur."""
    numbers = table.select_dtypes("number").columns
    rows = [table.assign(type=table["type"]), pd.DataFrame([{"type": "mean", **table[numbers].mean()}])]
    rest = table[~table["type"].isin(ALIKE)]
    if len(rest) < len(table):
        rows.append(pd.DataFrame([{"type": "mean without CD4, CD8", **rest[numbers].mean()}]))
    return pd.concat(rows, ignore_index=True)


def markdown(table: pd.DataFrame) -> str:
    """Markdown of a table: three digits of shares, whole numbers of seconds."""
    lines = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
    for _, row in table.iterrows():
        lines.append("| " + " | ".join(_cell(name, value) for name, value in row.items()) + " |")
    return "\n".join(lines)


def _cell(name: object, value: object) -> str:
    if isinstance(value, float):  # also missing text
        return "" if np.isnan(value) else f"{value:.0f}" if name in ("CPU s", "cells", "far") else f"{value:.3f}"
    return str(value)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--data", type=Path, help="folder of the two files")
    place.add_argument("--open-problems", type=Path, help="folder of a task of OpenProblems")
    parser.add_argument("--results", type=Path, default=Path("annotation.csv"), help="table of what is measured")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--methods", nargs="+", default=ALL, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.open_problems:
        rows = accuracy(open_problems(arguments.open_problems), arguments.methods, arguments.seeds[0])
        print(markdown(pd.DataFrame(rows)))
        return
    for seed in arguments.seeds:
        for part in arguments.parts:
            for task in arguments.tasks:
                run(arguments, task, part, seed)
    for title, table in summary(pd.read_csv(arguments.results)):
        print(f"\n{title}\n\n{markdown(table)}", flush=True)


def run(arguments: argparse.Namespace, task: str, part: str, seed: int) -> None:
    """Measure what the table of results lacks, and append it row by row."""
    rows = pd.read_csv(arguments.results) if arguments.results.exists() else pd.DataFrame(columns=["task"])
    if len(rows):
        rows = rows[(rows["task"] == task) & (rows["part"] == part) & (rows["seed"] == seed)]
    done = set(rows["method" if part == "accuracy" else "type"]) if len(rows) else set[str]()
    data = load(arguments.data, task, seed)
    for row in measure(data, seed, part, arguments.methods, done):
        found = pd.DataFrame([{"task": task, "part": part, "seed": seed} | row]).reindex(columns=COLUMNS)
        found.to_csv(arguments.results, mode="a", index=False, header=not arguments.results.exists())


def load(folder: Path, task: str, seed: int) -> Data:
    """The cells of a task."""
    if task == SIMULATED:
        return simulated_studies(seed)
    return blood(folder, task) if task in BLOOD else pancreas(folder, task)


if __name__ == "__main__":
    main()
