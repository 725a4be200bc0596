"""Distances of the same cells between two embeddings in one space."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Distances:
    """Distances of cells between two embeddings in the same space.

    Attributes
    ----------
    mean, largest
        Mean and largest Euclidean distance.
    largest_difference
        Largest difference of a coordinate.
    scale
        Mean distance of the cells from their center in the first embedding, to compare with.
    """

    mean: float
    largest: float
    largest_difference: float
    scale: float


def distances(one: Points, other: Points) -> Distances:
    """Distances of each cell between two embeddings, float32 (cells, dimensions) each."""
    difference = one.astype(np.float64) - other
    lengths = np.linalg.norm(difference, axis=1)
    scale = np.linalg.norm(one - one.mean(axis=0), axis=1).mean()
    return Distances(float(lengths.mean()), float(lengths.max()), float(np.abs(difference).max()), float(scale))
