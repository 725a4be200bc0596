"""Labels of reference cells for other cells, by their places in an embedding; what is like none is `unknown`."""

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

from census_scvi.config_errors import suggestion
from census_scvi.errors import UserError
from census_scvi.query.neighbours import EXACT_CELLS, NeighbourIndex, Points

log = logging.getLogger(__name__)

UNKNOWN = "unknown"
NEIGHBOURS, FOREST, REGRESSION = METHODS = ("neighbours", "random_forest", "logistic_regression")
# Cells of each label with which the bound of `unknown` is set, and the fewest that make a label count for it.
_PROBES, _FEWEST = 200, 10
# Of the known cells at least so many shall keep their name.
_LEAST_KEPT = 0.9
# From how many cells on a query has a distance of its own; how much farther than usual it may lie without a word.
_FEWEST_OF_A_STUDY, _FAR = 100, 1.5
_BLOCK_CELLS = 2**14


@dataclass(frozen=True)
class Prediction:
    """Labels of some cells.

    Attributes
    ----------
    labels
        object (cells,): the likeliest label, whether the cell is unknown or not.
    probability
        float32 (cells,): share of the neighbours' weight that this label has; with another method, what that says.
    uncertainty
        float32 (cells,), 0 to 1: how far the cell lies from its neighbours; 0.5 at the bound of `unknown`.
    unknown
        bool (cells,): uncertainty above 0.5.
    shift
        How many times as far from the reference the cells lie, in the median, as the reference's own studies from one
        another; 1 where they lie no farther, or are too few to tell.
    """

    labels: npt.NDArray[np.object_]
    probability: npt.NDArray[np.float32]
    uncertainty: npt.NDArray[np.float32]
    unknown: npt.NDArray[np.bool_]
    shift: float


@dataclass(frozen=True)
class UnknownBound:
    """How well cells of types that the reference lacks are told from known ones.

    Attributes
    ----------
    distance
        Mean distance to the neighbours above which a cell is unknown.
    typical
        Its median over cells of known types.
    known_kept
        Share of the cells of known types that are not unknown, mean over types.
    left_out_found
        Share of the cells of a type that was left out that are, mean over types; NaN where there are too few types.
    """

    distance: float
    typical: float
    known_kept: float
    left_out_found: float


class LabelTransfer:
    """Labels by the nearest neighbours in an embedding, or by a classifier on it; `unknown` by distance in either case.

    Parameters
    ----------
    points
        (cells, dimensions): the reference.
    labels
        (cells,): label of each; missing ones are not admitted.
    groups
        (cells,): study or donor of each reference cell. A query comes from another study than its neighbours; with
        groups the bound of `unknown` is set in that situation. None: all one group.
    n_neighbours
        Neighbours a cell.
    exact_cells
        Up to how many reference cells the search is exact.
    method
        `neighbours`, `random_forest` or `logistic_regression` (on standardised dimensions).
    seed
        Of the probes, of an approximate index and of the forest.

    Attributes
    ----------
    classes
        The labels, sorted.
    bound
        How `unknown` is decided.

    Raises
    ------
    UserError
        No cells, a cell without a label, or no such method.
    """

    def __init__(
        self,
        points: Points,
        labels: npt.ArrayLike,
        groups: npt.ArrayLike | None = None,
        *,
        n_neighbours: int = 15,
        exact_cells: int = EXACT_CELLS,
        method: str = NEIGHBOURS,
        seed: int = 0,
    ) -> None:
        check_method(method)
        names = np.asarray(labels, dtype=object)
        if not len(names):
            raise UserError("the reference has no cells")
        if any(not isinstance(name, str) or not name for name in names):
            raise UserError("the reference has cells without a label; leave them out")
        self._points = np.ascontiguousarray(points, np.float32)
        unique, self._codes = np.unique(names.astype(str), return_inverse=True)
        self.classes = [str(name) for name in unique]
        self._groups = None if groups is None else np.unique(np.asarray(groups).astype(str), return_inverse=True)[1]
        self._n_neighbours = n_neighbours
        self._index = NeighbourIndex(self._points, exact_cells=exact_cells, seed=seed)
        self.bound = self._set_bound(np.random.default_rng(seed))
        self._classifier = None
        if method != NEIGHBOURS and len(self.classes) > 1:
            self._classifier = _classifier(method, seed).fit(self._points, self._codes)

    def predict(self, points: Points, *, warn: bool = True) -> Prediction:
        """Labels of the cells of a study, (cells, dimensions) in the same embedding.

        A study as a whole may lie farther from the reference than the reference's own studies from one another, for
        another chemistry or treatment. Distances are divided by how much farther; where that is much, and `warn`, a
        warning says so: where most of the cells are of types that the reference lacks, that looks the same.
        """
        best, probability = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
        distance = np.empty(len(points))
        for start in range(0, len(points), _BLOCK_CELLS):
            rows = slice(start, start + _BLOCK_CELLS)
            distances, positions = self._index.query(points[rows], self._n_neighbours)
            classifier = self._classifier
            votes = classifier.predict_proba(points[rows]) if classifier else self._vote(distances, positions)
            best[rows], probability[rows] = votes.argmax(axis=1), votes.max(axis=1)
            distance[rows] = distances.mean(axis=1, dtype=np.float64)
        shift = self._shift(distance)
        if warn and shift > _FAR:
            log.warning(
                "the cells lie %.1f times as far from the reference as its own studies from one another: another"
                " chemistry or treatment - or most are of types that the reference lacks, and their labels wrong",
                shift,
            )
        ratio = distance / shift / max(self.bound.distance, 1e-6)
        return Prediction(
            labels=np.array(self.classes, dtype=object)[best],
            probability=probability,
            uncertainty=(ratio / (ratio + 1)).astype(np.float32),  # half at the bound, towards one with the distance
            unknown=ratio > 1,
            shift=shift,
        )

    def _shift(self, distance: npt.NDArray[np.float64]) -> float:
        if len(distance) < _FEWEST_OF_A_STUDY or not self.bound.typical:
            return 1.0
        return max(float(np.median(distance)) / self.bound.typical, 1.0)

    def _vote(self, distances: npt.NDArray[Any], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Shares of the labels, nearer neighbours weighing more."""
        weights = np.exp(-np.square(distances / np.maximum(distances.mean(axis=1, keepdims=True), 1e-12)))
        votes = np.zeros((len(distances), len(self.classes)), np.float32)
        rows = np.repeat(np.arange(len(distances)), distances.shape[1])
        np.add.at(votes, (rows, self._codes[positions].ravel()), weights.ravel())
        return votes / votes.sum(axis=1, keepdims=True)

    def _set_bound(self, generator: np.random.Generator) -> UnknownBound:
        """The distance that best tells cells of types left out of the reference from cells of types in it.

        Of those that leave nine in ten of the latter their name: where the two cannot be told apart, none is unknown.
        """
        known, left_out = [], []
        for label in range(len(self.classes)):
            cells = np.flatnonzero(self._codes == label)
            if len(cells) < _FEWEST:
                continue
            probes = generator.choice(cells, min(_PROBES, len(cells)), replace=False)
            known.append(self._as_known(probes))
            others = np.flatnonzero(self._codes != label)
            if len(others) > self._n_neighbours:
                left_out.append(self._against(probes, others))
        if not known:
            return UnknownBound(float("inf"), 0.0, 1.0, float("nan"))
        typical = float(np.median(np.concatenate(known)))
        if not left_out:
            return UnknownBound(float(np.quantile(np.concatenate(known), 0.99)), typical, 0.99, float("nan"))
        bounds = np.unique(np.quantile(np.concatenate(known + left_out), np.linspace(0, 1, 501)))
        kept = np.mean([(some[:, None] <= bounds).mean(axis=0) for some in known], axis=0)
        found = np.mean([(some[:, None] > bounds).mean(axis=0) for some in left_out], axis=0)
        best = int(np.argmax(np.where(kept >= _LEAST_KEPT, kept + found, -1)))
        return UnknownBound(float(bounds[best]), typical, float(kept[best]), float(found[best]))

    def _as_known(self, probes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Distance of reference cells to the others: of other groups, where there are some with their label."""
        everything = np.arange(len(self._points))
        if self._groups is None:
            return self._against(probes, everything, itself=True)
        found = []
        label = self._codes[probes[0]]
        for group in np.unique(self._groups[probes]):
            mine = probes[self._groups[probes] == group]
            others = np.flatnonzero(self._groups != group)
            if len(others) > self._n_neighbours and (self._codes[others] == label).any():
                found.append(self._against(mine, others))
            else:
                found.append(self._against(mine, everything, itself=True))
        return np.concatenate(found)

    def _against(
        self, probes: npt.NDArray[np.int64], reference: npt.NDArray[np.int64], *, itself: bool = False
    ) -> npt.NDArray[np.float64]:
        """Mean distance of reference cells to their neighbours among some of the reference."""
        index = self._index if itself else NeighbourIndex(self._points[reference], exact_cells=len(reference))
        distances, _ = index.query(self._points[probes], self._n_neighbours + itself)
        own = distances[:, int(itself) :]
        return own.mean(axis=1, dtype=np.float64) if own.shape[1] else np.zeros(len(own))


def check_method(method: str) -> None:
    """UserError for what is no method."""
    if method not in METHODS:
        raise UserError(f"method is {method!r}{suggestion(method, list(METHODS))}; choose {', '.join(METHODS)}")


def _classifier(method: str, seed: int) -> Any:
    if method == FOREST:
        return RandomForestClassifier(random_state=seed, n_jobs=-1)
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
