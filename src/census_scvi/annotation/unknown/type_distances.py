"""Distance of cells to the nearest labelled type, relative to the distances within this type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from census_scvi.neighbors.index import NeighborIndex

# Cells of a type to which a distance is the mean, and maximum number of cells per type that are searched.
_NEAREST, _MOST = 5, 1_000
# Weight of a spherical covariance in the covariance within types.
_SPHERICAL = 0.1
_LEAST_DISTANCE = 1e-12


@dataclass(frozen=True)
class TypeDistances:
    """Distances of cells to each type.

    Attributes
    ----------
    to_type
        float32 (cells, types): distance to the labelled cells of a type; infinite for a type without cells.
    within
        float64 (types,): median of the same distance over the labelled cells of the type.
    """

    to_type: npt.NDArray[np.float32]
    within: npt.NDArray[np.float64]

    @classmethod
    def to_nearest(
        cls,
        space: npt.NDArray[np.float32],
        train: npt.NDArray[np.int64],
        codes: npt.NDArray[np.int64],
        n_classes: int,
        test: npt.NDArray[np.int64],
        seed: int = 0,
    ) -> TypeDistances:
        """Mean distance to the five nearest labelled cells, in an embedding of all cells.

        Parameters are as in `Annotator.predict`. Of a type with many cells, some are drawn with `seed`.
        """
        numbers = np.random.default_rng(seed)
        to_type = np.full((len(test), n_classes), np.inf, np.float32)
        within = np.full(n_classes, np.nan)
        for code in np.unique(codes):
            members = train[codes == code]
            if len(members) > _MOST:
                members = numbers.choice(members, _MOST, replace=False)
            index = NeighborIndex(space[members])
            to_type[:, code] = index.query(space[test], _NEAREST)[0].mean(axis=1)
            if len(members) > 1:
                itself, _ = index.query(space[members], _NEAREST + 1)
                within[code] = np.median(itself[:, 1:].mean(axis=1))
        return cls(to_type, _filled(within))

    @classmethod
    def to_means(
        cls,
        space: npt.NDArray[np.float32],
        train: npt.NDArray[np.int64],
        codes: npt.NDArray[np.int64],
        n_classes: int,
        test: npt.NDArray[np.int64],
    ) -> TypeDistances:
        """Mahalanobis distance to the mean of each type, by the covariance within types.

        Parameters are as in `Annotator.predict`. All types have the same weight in the covariance, except those with
        fewer cells than half of the dimensions.
        """
        points = space[train].astype(np.float64)
        means = np.full((n_classes, points.shape[1]), np.nan)
        for code in np.unique(codes):
            means[code] = points[codes == code].mean(axis=0)
        whiten = np.linalg.inv(np.linalg.cholesky(_covariance_within(points - means[codes], codes))).T
        points, means, of_test = points @ whiten, means @ whiten, space[test] @ whiten
        to_type = np.full((len(test), n_classes), np.inf, np.float32)
        within = np.full(n_classes, np.nan)
        for code in np.unique(codes):
            to_type[:, code] = np.linalg.norm(of_test - means[code], axis=1)
            within[code] = np.median(np.linalg.norm(points[codes == code] - means[code], axis=1))
        return cls(to_type, _filled(within))

    def score(self, without: int | None = None) -> npt.NDArray[np.float64]:
        """Log of the distance to the nearest type relative to the distances within it, float64 (cells,).

        Parameters
        ----------
        without
            A type to ignore, as if the reference lacked it.
        """
        distances: npt.NDArray[Any] = self.to_type
        if without is not None:
            distances = distances.copy()
            distances[:, without] = np.inf
        nearest = distances.argmin(axis=1)
        least = np.take_along_axis(distances, nearest[:, None], axis=1)[:, 0]
        return np.log(np.maximum(least, _LEAST_DISTANCE) / self.within[nearest])


def _covariance_within(deviations: npt.NDArray[np.float64], codes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Mean covariance of the types, and a spherical part so that it can be inverted."""
    n_dimensions = deviations.shape[1]
    frequent = np.flatnonzero(np.bincount(codes) > n_dimensions // 2)
    parts = [deviations[codes == code] for code in frequent] or [deviations]
    covariance = np.mean([part.T @ part / len(part) for part in parts], axis=0)
    variance = max(float(np.trace(covariance)) / n_dimensions, _LEAST_DISTANCE)
    return (1 - _SPHERICAL) * covariance + _SPHERICAL * variance * np.eye(n_dimensions)


def _filled(within: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Distances within types; the median of the others for a type of one cell or of equal cells."""
    usable = np.isfinite(within) & (within > 0)
    usual = np.median(within[usable]) if usable.any() else 1.0
    return np.maximum(np.where(usable, within, usual), _LEAST_DISTANCE)
