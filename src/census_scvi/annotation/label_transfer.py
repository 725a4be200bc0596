"""Label transfer by nearest neighbors in an embedding; cells far from the reference are `unknown`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from census_scvi.annotation.label_shares import label_shares
from census_scvi.annotation.unknown_old import UnknownThreshold, set_threshold
from census_scvi.config.arguments import require_whole
from census_scvi.config.messages import suggestion
from census_scvi.errors import UserError
from census_scvi.neighbors.index import EXACT_CELLS, NeighborIndex, Points

log = logging.getLogger(__name__)

UNKNOWN = "unknown"
NEIGHBORS, FOREST, REGRESSION = METHODS = ("neighbors", "random_forest", "logistic_regression")
_BLOCK_CELLS = 2**14


@dataclass(frozen=True)
class Prediction:
    """Labels of some cells.

    Attributes
    ----------
    labels
        object (cells,): the most likely label, also for unknown cells.
    probability
        float32 (cells,): share of this label in the weight of the neighbors, or its probability by the classifier.
    uncertainty
        float32 (cells,), 0 to 1: scaled distance of the cell to its neighbors; 0.5 at the threshold of `unknown`.
    unknown
        bool (cells,): uncertainty above 0.5.
    shift
        Distance ratio: distance of the cells to the reference, divided by the distance of the reference's own cells;
        1 if it is smaller than 1, or if there are too few cells.
    corrected_by
        The distances are divided by this number before the comparison with the threshold; 1: no correction.
    far
        Whether the ratio is larger than between the reference's own studies. The distances are then not corrected, and
        neither labels nor `unknown` are reliable.
    """

    labels: npt.NDArray[np.object_]
    probability: npt.NDArray[np.float32]
    uncertainty: npt.NDArray[np.float32]
    unknown: npt.NDArray[np.bool_]
    shift: float
    corrected_by: float
    far: bool


class LabelTransfer:
    """Label transfer by nearest neighbors in an embedding or by a classifier on it; `unknown` always uses the distance.

    Parameters
    ----------
    points
        (cells, dimensions): the reference. Copies of a cell (equal position and label) count once.
    labels
        (cells,): label of each cell; missing labels are not allowed.
    groups
        (cells,): study or donor of each reference cell. A query is from another study than its neighbors, so the
        threshold of `unknown` is set with neighbors from other groups. None: all cells are one group.
    n_neighbors
        Neighbors per cell, 1 or more.
    exact_cells
        Maximum number of reference cells for an exact search.
    method
        `neighbors`, `random_forest` or `logistic_regression` (on standardised dimensions).
    seed
        Seed of the probes, the approximate index and the forest.

    Attributes
    ----------
    classes
        The labels, sorted.
    bound
        The threshold of `unknown` and its measured quality.

    Raises
    ------
    UserError
        There are not more cells than neighbors, a cell has no label or no finite position, or the method is unknown.
    """

    def __init__(
        self,
        points: Points,
        labels: npt.ArrayLike,
        groups: npt.ArrayLike | None = None,
        *,
        n_neighbors: int = 15,
        exact_cells: int = EXACT_CELLS,
        method: str = NEIGHBORS,
        seed: int = 0,
    ) -> None:
        check_method(method)
        require_whole("n_neighbors", n_neighbors, 1)
        names = np.asarray(labels, dtype=object)
        if any(not isinstance(name, str) or not name for name in names):
            raise UserError("the reference has cells without a label; exclude them")
        points = np.ascontiguousarray(points, np.float32)
        if not np.isfinite(points).all():
            raise UserError("the reference has cells without a finite position; exclude them")
        unique, codes = np.unique(names.astype(str), return_inverse=True)
        kept = _without_copies(points, codes)
        if len(kept) <= n_neighbors:
            raise UserError(_too_few(len(kept), len(names), n_neighbors))
        self._points, self._codes = points[kept], codes[kept]
        self.classes = [str(name) for name in unique]
        studies = np.zeros(len(names), np.int64)
        if groups is not None:
            studies = np.unique(np.asarray(groups).astype(str), return_inverse=True)[1]
        self._n_neighbors = n_neighbors
        self._index = NeighborIndex(self._points, exact_cells=exact_cells, seed=seed)
        self.bound: UnknownThreshold = set_threshold(
            self._points, self._codes, studies[kept], n_neighbors=n_neighbors, seed=seed
        )
        self._classifier = None
        if method != NEIGHBORS and len(self.classes) > 1:
            self._classifier = _classifier(method, seed).fit(self._points, self._codes)

    def predict(self, points: Points, *, empty: npt.NDArray[np.bool_] | None = None, warn: bool = True) -> Prediction:
        """Predict the labels of the cells of one study.

        The cells of a study may be farther from the reference than the reference's own cells, for example because of
        another chemistry or treatment. The distances are divided by this ratio if it is not larger than between the
        reference's own studies. A larger ratio is not corrected, because cells of types that the reference lacks have
        the same effect; it gives a warning.

        Parameters
        ----------
        points
            (cells, dimensions) in the same embedding.
        empty
            bool (cells,): cells without counts, whose position is meaningless. They are unknown, with probability 0.
        warn
            Whether to warn if the cells are far from the reference.
        """
        empty = np.zeros(len(points), bool) if empty is None else empty
        best, probability = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
        distance, nearest = np.empty(len(points)), np.empty(len(points), np.int64)
        for start in range(0, len(points), _BLOCK_CELLS):
            rows = slice(start, start + _BLOCK_CELLS)
            distances, positions = self._index.query(points[rows], self._n_neighbors)
            classifier = self._classifier
            votes = classifier.predict_proba(points[rows]) if classifier else self._vote(distances, positions)
            best[rows], probability[rows] = votes.argmax(axis=1), votes.max(axis=1)
            distance[rows], nearest[rows] = distances.mean(axis=1, dtype=np.float64), self._codes[positions[:, 0]]
        found = self.bound.apply(distance[~empty], nearest[~empty])
        if warn and found.far:
            log.warning("%s", self.bound.warning(found.ratio))
        excess = distance / found.divisor / self.bound.distance
        uncertainty = (excess / (excess + 1)).astype(np.float32)  # 0.5 at the threshold, approaches 1 with the distance
        return Prediction(
            labels=np.array(self.classes, dtype=object)[best],
            probability=np.where(empty, np.float32(0), probability),
            uncertainty=np.where(empty, np.float32(1), uncertainty),
            unknown=empty | (excess > 1),
            shift=found.ratio,
            corrected_by=found.divisor,
            far=found.far,
        )

    def _vote(self, distances: npt.NDArray[Any], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Label shares; nearer neighbors have a larger weight."""
        weights = np.exp(-np.square(distances / np.maximum(distances.mean(axis=1, keepdims=True), 1e-12)))
        return label_shares(weights, self._codes[positions], len(self.classes))


def check_method(method: str) -> None:
    """UserError if the method is unknown."""
    if method not in METHODS:
        raise UserError(f"method is {method!r}{suggestion(method, list(METHODS))}; choose {', '.join(METHODS)}")


def _too_few(different: int, cells: int, n_neighbors: int) -> str:
    copies = f", {different:,} of them different," if different < cells else ""
    return (
        f"the reference has {cells:,} labelled cell{'s' * (cells != 1)}{copies} and n_neighbors={n_neighbors} needs"
        f" {n_neighbors + 1} or more; take more reference cells (obs_filter), or fewer neighbors"
    )


def _without_copies(points: Points, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Rows of the cells without copies, ascending: the first cell of each position and label."""
    rows = np.column_stack([points + np.float32(0), codes.astype(np.float32)])  # changes -0.0 to 0.0
    bytes_of = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.itemsize * rows.shape[1]))).ravel()
    return np.sort(np.unique(bytes_of, return_index=True)[1])


def _classifier(method: str, seed: int) -> Any:
    if method == FOREST:
        return RandomForestClassifier(random_state=seed, n_jobs=-1)
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
