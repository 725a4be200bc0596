"""Unknown cells and calibration of a saved classifier of scNym's method, with types excluded from the reference.

    python benchmarks/scnym_unknown.py --data FOLDER [--presets no_new_identity ...] [--seeds 0 1] [--epochs 26]

FOLDER holds pbmc_multi_human.h5ad: Kang et al. are annotated with pbmc3k and FACS-sorted blood as the reference, first
with all types, then without B cells, CD14 monocytes and NK cells; about a minute per training. docs/scnym.md has the
results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from annotation import Data, blood, markdown
from sklearn.metrics import roc_auc_score

from census_scvi.annotation.labelled.labels import UNLABELLED
from census_scvi.annotation.scnym.cells import InMemory
from census_scvi.annotation.scnym.settings import PRESETS, hyperparameters
from census_scvi.annotation.scnym.training import train
from census_scvi.annotation.scnym.validated import Validated
from census_scvi.annotation.validation.folds import BY_CELLS
from census_scvi.annotation.validation.held_out import HeldOut

EXCLUDED = (None, "B cell", "CD14 monocyte", "NK cell")


def row(data: Data, preset: str, epochs: int, seed: int, excluded: str | None) -> dict[str, object]:
    """Accuracy, calibration and unknown cells of one training."""
    reference = data.reference[data.labels[data.reference] != excluded]
    cells, labels, truth = data.task(reference, data.query)
    donors = np.append(cells.batch[cells.reference], np.full(len(truth), "query", dtype=object))
    settings = hyperparameters(preset, {"n_epochs": epochs, "min_epochs": min(epochs, 20)})
    all_labels = np.append(labels, np.full(len(truth), UNLABELLED, dtype=object))
    result = train(
        InMemory(cells.counts), cells.genes, all_labels, settings, domains=cells.batch, donors=donors, seed=seed
    )
    classifier, n_labelled = result.classifier, cells.n_reference
    own, query = (
        classifier.predict(InMemory(part), classifier.genes)
        for part in (cells.counts[:n_labelled], cells.counts[n_labelled:])
    )
    codes = np.searchsorted(classifier.classes, labels.astype(str))
    validated = Validated.of(own, codes, result.validation[:n_labelled], BY_CELLS, assumes_known=False, seed=seed)
    found = validated.annotation(query, cells.query_batch)
    known, missing = np.isin(truth.astype(str), found.classes), truth == excluded
    compared = known | missing
    errors = [
        HeldOut.of(truth[known], (found.labels[known], each.max(axis=1)[known])).calibration_error
        for each in (query.probability, found.probability)
    ]
    return {
        "preset": preset,
        "seed": str(seed),
        "excluded": excluded or "",
        "accuracy": (found.labels == truth)[known].mean(),
        "validation": validated.quality["accuracy"],
        "calibration before": errors[0],
        "after": errors[1],
        "kept": (~found.unknown[known]).mean(),
        "found": found.unknown[missing].mean() if missing.any() else float("nan"),
        "AUROC": roc_auc_score(missing[compared], found.uncertainty[compared]) if missing.any() else float("nan"),
    }


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of pbmc_multi_human.h5ad")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=26)
    arguments = parser.parse_args()
    data = blood(arguments.data, "forward")
    rows = [
        row(data, preset, arguments.epochs, seed, excluded)
        for preset in arguments.presets
        for seed in arguments.seeds
        for excluded in EXCLUDED
    ]
    print(markdown(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
