"""Distance of cells to the nearest labelled type, relative to the distances within this type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from census_scvi.neighbors.index import NeighborIndex

# Cells of a type to which a distance is the mean, and maximum number of cells per type that are searched.
_NEAREST, _MOST = 5, 1_000
_LEAST_DISTANCE = 1e-12


@dataclass(frozen=True)
class TypeDistances:
    """Distances of cells to each type.

    Attributes
    ----------
    to_type
        float32 (cells, types): mean distance to the five nearest labelled cells; infinite for a type without cells.
    within
        float64 (types,): median of the same distance over the labelled cells of the type, without the cell itself.
    """

    to_type: npt.NDArray[np.float32]
    within: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls,
        space: npt.NDArray[np.float32],
        train: npt.NDArray[np.int64],
        codes: npt.NDArray[np.int64],
        n_classes: int,
        test: npt.NDArray[np.int64],
        seed: int = 0,
    ) -> TypeDistances:
        """Search in an embedding of all cells; parameters as in `Annotator.predict`.

        Of a type with many cells, some are drawn with `seed`.
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
        known = within[np.isfinite(within) & (within > 0)]
        usual = np.median(known) if len(known) else 1.0
        within = np.where(np.isfinite(within) & (within > 0), within, usual)
        return cls(to_type, np.maximum(within, _LEAST_DISTANCE))

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
