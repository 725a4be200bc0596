"""Accuracy of label transfer and its baselines on held-out studies of the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.calibration import calibration_curve
from sklearn.metrics import recall_score
from sklearn.model_selection import GroupKFold, KFold

from census_scvi.annotation.baselines import Baselines, Labels, Named
from census_scvi.annotation.label_transfer import NEIGHBORS, LabelTransfer
from census_scvi.errors import UserError

MODEL = "scvi"
_FOLDS, _BINS = 3, 10
_COVERAGE = np.linspace(0.05, 1, 20)


@dataclass(frozen=True)
class HeldOut:
    """Predicted labels of held-out cells, compared with their true ones.

    Attributes
    ----------
    accuracy
        Share of the cells that got the right label.
    mean_over_types
        The same, mean over types, however rare.
    calibration_error
        Expected calibration error: mean absolute difference of `right` and `probability`.
    probability, right
        (bins,): mean probability of the cells of a bin, and share of them that got the right label; ten bins of equal
        size, fewer where many cells have the same probability.
    coverage, risk
        (20,): share of the cells that are kept, the most confident first, and share of these with a wrong label.
    """

    accuracy: float
    mean_over_types: float
    calibration_error: float
    probability: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]
    coverage: npt.NDArray[np.float64]
    risk: npt.NDArray[np.float64]

    @classmethod
    def of(cls, truth: Labels, named: Named, seed: int = 0) -> HeldOut:
        """Of true labels, and labels with their probabilities."""
        labels, probability = named
        right = labels == truth
        bins = calibration_curve(right, np.clip(probability, 0, 1), n_bins=_BINS, strategy="quantile")
        # Cells that are equally sure come in any order.
        order = np.lexsort((np.random.default_rng(seed).random(len(right)), -probability))
        wrong = np.cumsum(~right[order])
        named_cells = np.maximum((_COVERAGE * len(right)).round().astype(int), 1)
        names = truth.astype(str)
        return cls(
            accuracy=float(right.mean()),
            mean_over_types=float(
                recall_score(names, labels.astype(str), labels=np.unique(names), average="macro", zero_division=0)
            ),
            calibration_error=float(np.abs(bins[0] - bins[1]).mean()),
            probability=bins[1],
            right=bins[0],
            coverage=_COVERAGE,
            risk=wrong[named_cells - 1] / named_cells,
        )


def hold_out(
    latent: npt.NDArray[np.float32],
    counts: sp.csr_matrix,
    labels: Labels,
    studies: Labels | None,
    genes: npt.NDArray[np.bool_],
    *,
    method: str = NEIGHBORS,
    n_neighbors: int = 15,
    seed: int = 0,
) -> dict[str, HeldOut]:
    """Predict the labels of each third of the studies from the others: in the latent space, and without the model.

    The model was trained on the counts of all of them, without labels; the PCA was not. On a study that the model was
    not trained on its accuracy is lower.

    Parameters
    ----------
    latent, counts
        (cells, n_latent), and CSR (cells, genes) of raw counts: the reference.
    labels, studies
        (cells,) each; studies None: thirds of the cells, at random.
    genes
        bool (genes,): those that `Baselines` look at.
    method, n_neighbors
        As `LabelTransfer` takes them.
    seed
        Of everything random.

    Returns
    -------
    `scvi`, `pca` and `logistic_regression`; empty where no type is in two studies, or where the cells are too few.
    """
    truth: list[Labels] = []
    found: dict[str, list[Named]] = {}
    for train, test in _folds(labels, studies, seed):
        try:
            transfer = LabelTransfer(latent[train], labels[train], n_neighbors=n_neighbors, method=method, seed=seed)
        except UserError:
            continue  # too few different cells to learn from
        named = transfer.predict(latent[test], warn=False)
        baselines = Baselines(counts[train], labels[train], genes, n_neighbors=n_neighbors, seed=seed)
        truth.append(labels[test])
        for name, result in {MODEL: (named.labels, named.probability), **baselines.predict(counts[test])}.items():
            found.setdefault(name, []).append(result)
    return {
        name: HeldOut.of(np.concatenate(truth), (np.concatenate(some), np.concatenate(sure)), seed)
        for name, (some, sure) in ((name, zip(*parts, strict=True)) for name, parts in found.items())
    }


def _folds(labels: Labels, studies: Labels | None, seed: int) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Training rows and held-out rows; the latter only of types that the former have."""
    if studies is None:
        parts = KFold(_FOLDS, shuffle=True, random_state=seed).split(labels)
    else:
        n_studies = len(np.unique(studies.astype(str)))
        parts = GroupKFold(min(_FOLDS, n_studies), shuffle=True, random_state=seed).split(labels, groups=studies)
    for train, test in parts:
        known = np.unique(labels[train].astype(str))
        named = test[np.isin(labels[test].astype(str), known)]
        if len(known) > 1 and len(named):
            yield train, named
