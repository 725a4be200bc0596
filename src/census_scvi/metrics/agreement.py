"""How well two embeddings of the same cells agree: distances, neighbors, clusters, and labels of a reference."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from census_scvi.neighbors.clusters import leiden
from census_scvi.neighbors.index import NeighborIndex

Points = npt.NDArray[np.float32]
Labels = npt.NDArray[np.object_]
Positions = npt.NDArray[np.int64]

NEIGHBORS = 15
# Classifiers of `LabelTransfer`.
CLASSIFIERS = ("neighbors", "random_forest", "mlp")
_STEPS_OF_MLP = 200


def neighbor_overlap(one: Points, other: Points, n_neighbors: int = NEIGHBORS) -> float:
    """Mean share of a cell's nearest neighbors in one embedding that are also among those in the other one.

    Parameters
    ----------
    one, other
        float32 (cells, dimensions): embeddings of the same cells; the dimensions may differ.
    n_neighbors
        Neighbors per cell; all other cells if there are fewer.
    """
    return shared_neighbors(*(NeighborIndex(points).others(n_neighbors) for points in (one, other)))


def shared_neighbors(one: Positions, other: Positions) -> float:
    """`neighbor_overlap` of neighbors that are known, int64 (cells, neighbors) each."""
    return float(common_neighbors(one, other).sum() / one.size)


def common_neighbors(one: Positions, other: Positions) -> Positions:
    """Number of neighbors of each cell that are the same in both, int64 (cells,); no neighbor may be there twice."""
    both = np.sort(np.concatenate([one, other], axis=1), axis=1)  # a shared neighbor is there twice
    return np.asarray((both[:, 1:] == both[:, :-1]).sum(axis=1), np.int64)


def cluster_agreement(one: Points, other: Points, *, resolution: float = 1.0, seed: int = 0) -> float:
    """Adjusted Rand index of the Leiden clusters of two embeddings of the same cells: 1 if equal, about 0 by chance."""
    first, second = (leiden(points, resolution, seed) for points in (one, other))
    return float(adjusted_rand_score(first.codes, second.codes))


class LabelTransfer:
    """Classifiers of the labels of reference cells on their embedding, which give labels to query cells.

    Parameters
    ----------
    reference
        float32 (reference cells, dimensions).
    labels
        object (reference cells,): a label of each.
    classifiers
        `neighbors`: most frequent label of the 15 nearest reference cells; `random_forest`; `mlp`: a network with a
        hidden layer of 100 units. The last two as in scikit-learn by default, on standardised dimensions.
    seed
        Seed of forest and network.
    """

    def __init__(
        self, reference: Points, labels: Labels, classifiers: Sequence[str] = CLASSIFIERS, *, seed: int = 0
    ) -> None:
        self._names, self._codes = np.unique(labels.astype(str), return_inverse=True)
        self._scale = StandardScaler().fit(reference)
        scaled = self._scale.transform(reference)
        self._classifiers = {
            name: NeighborIndex(reference, seed=seed)
            if name == "neighbors"
            else _fitted(name, scaled, self._codes, seed)
            for name in classifiers
        }

    def __call__(self, query: Points) -> dict[str, Labels]:
        """Labels of query cells, float32 (cells, dimensions), by each classifier: object (cells,)."""
        found = {}
        for name, classifier in self._classifiers.items():
            if isinstance(classifier, NeighborIndex):
                _, nearest = classifier.query(query, NEIGHBORS)
                votes = [np.bincount(self._codes[rows], minlength=len(self._names)).argmax() for rows in nearest]
                codes = np.array(votes, np.int64)
            else:
                codes = classifier.predict(self._scale.transform(query))
            found[name] = self._names[codes].astype(object)
        return found


def _fitted(classifier: str, points: Points, codes: npt.NDArray[np.integer], seed: int) -> Any:
    models = {
        "random_forest": RandomForestClassifier(random_state=seed, n_jobs=1),
        "mlp": MLPClassifier(max_iter=_STEPS_OF_MLP, random_state=seed),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return models[classifier].fit(points, codes)


def share_equal(one: Labels, other: Labels) -> float:
    """Share of the cells with the same label in both, of those with a label (not None) in both; NaN without any."""
    known = np.array([a is not None and b is not None for a, b in zip(one, other, strict=True)], dtype=bool)
    return float((one[known] == other[known]).mean()) if known.any() else float("nan")


def accuracy_gain(truth: Labels, labels: Labels, others: Labels) -> tuple[float, float]:
    """Accuracy of labels minus that of other labels of the same cells, and the standard error of the difference.

    The error is that of paired outcomes: cells that both get right, or both get wrong, do not add to it. NaN without
    any known label (not None).
    """
    known = np.array([label is not None for label in truth], dtype=bool)
    if not known.any():
        return float("nan"), float("nan")
    outcome = (labels == truth)[known].astype(float) - (others == truth)[known]
    return float(outcome.mean()), float(outcome.std() / np.sqrt(len(outcome)))


def mixing_within_types(
    reference: Points, reference_types: Labels, query: Points, query_types: Labels, n_neighbors: int = NEIGHBORS
) -> float:
    """How well query and reference mix within cell types: 0 if they are separated, 1 if they are perfectly mixed.

    The share of reference cells among the nearest neighbors of a query cell of the same type, as a share of what is
    expected if the cells of the type are shuffled; mean over the query cells whose type both have.

    Parameters
    ----------
    reference, query
        float32 (cells, dimensions).
    reference_types, query_types
        object (cells,): type of each cell; None: unknown, the cell is excluded.
    n_neighbors
        Neighbors per cell; all other cells of the type if there are fewer.

    Returns
    -------
    The ratio, NaN if no type is shared; slightly above 1 if query cells avoid each other.
    """
    shared = {label for label in reference_types if label is not None} & set(query_types)
    ratios, weights = [], []
    for label in sorted(map(str, shared)):
        of_reference, of_query = reference[reference_types == label], query[query_types == label]
        both = np.concatenate([of_query, of_reference])
        nearest = NeighborIndex(both).others(n_neighbors)[: len(of_query)]
        expected = len(of_reference) / (len(both) - 1)
        ratios.append(float((nearest >= len(of_query)).mean()) / expected)
        weights.append(len(of_query))
    return float(np.average(ratios, weights=weights)) if ratios else float("nan")
