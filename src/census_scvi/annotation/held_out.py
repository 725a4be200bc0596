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
    """Quality of the predicted labels of held-out cells.

    Attributes
    ----------
    accuracy
        Share of the cells with the correct label.
    mean_over_types
        Macro-averaged recall: the same share per type, mean over types.
    calibration_error
        Expected calibration error: mean absolute difference of `right` and `probability` over bins.
    probability, right
        (bins,): mean probability of the cells in a bin, and share of them with the correct label; ten bins of equal
        size, fewer if many cells have the same probability.
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
        """Compare true labels with predicted labels and their probabilities."""
        labels, probability = named
        right = labels == truth
        bins = calibration_curve(right, np.clip(probability, 0, 1), n_bins=_BINS, strategy="quantile")
        # Cells with equal probability are in random order.
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
    """Predict the labels of each third of the studies from the other studies, in the latent space and by the baselines.

    The model was trained on the counts of all studies (without labels), but the PCA was fitted without the held-out
    studies. The accuracy of the model is lower for a study that it was not trained on.

    Parameters
    ----------
    latent, counts
        The reference: (cells, n_latent), and CSR (cells, genes) of raw counts.
    labels, studies
        (cells,) each; studies None: random thirds of the cells.
    genes
        bool (genes,): the genes that `Baselines` uses.
    method, n_neighbors
        Arguments of `LabelTransfer`.
    seed
        Random seed.

    Returns
    -------
    Results for `scvi`, `pca` and `logistic_regression`; empty if no type is in two studies, or there are too few cells.
    """
    truth: list[Labels] = []
    found: dict[str, list[Named]] = {}
    for train, test in _folds(labels, studies, seed):
        try:
            transfer = LabelTransfer(latent[train], labels[train], n_neighbors=n_neighbors, method=method, seed=seed)
        except UserError:
            continue  # too few different cells in the training part
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
    """Training rows and held-out rows; held-out cells of types without training cells are excluded."""
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
