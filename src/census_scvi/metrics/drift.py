"""How far cells moved between two embeddings: Procrustes analysis, shared neighbors, labels of the neighbors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.linalg import orthogonal_procrustes

from census_scvi.metrics.agreement import common_neighbors

Points = npt.NDArray[np.floating]
Positions = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Superposition:
    """The translation, rotation (or reflection) and scale that bring one embedding closest to another.

    Attributes
    ----------
    matrix
        float64 (dimensions, dimensions): rotation of the old embedding.
    scale
        Factor of the old embedding.
    old_center, new_center
        float64 (dimensions,): means of the cells.
    spread
        Root mean square distance of the cells from their mean in the new embedding.
    """

    matrix: Values
    scale: float
    old_center: Values
    new_center: Values
    spread: float

    def movement(self, old: Points, new: Points) -> Values:
        """Distance of each cell between the superposed old and the new embedding, in units of `spread`: (cells,)."""
        dimensions = len(self.matrix)
        placed = self.scale * (_padded(old, dimensions) - self.old_center) @ self.matrix
        moved = np.linalg.norm(placed - (_padded(new, dimensions) - self.new_center), axis=1)
        return moved / self.spread if self.spread > 0 else np.zeros(len(moved))


class Procrustes:
    """Procrustes analysis of two embeddings of the same cells, which are added in blocks.

    The embedding with fewer dimensions gets dimensions of zeros. The root mean square movement after the superposition
    is `sqrt(1 - r^2)`: 0 if one embedding is a rotation of the other, and 1 if they have nothing in common (Gower
    1975).

    Parameters
    ----------
    n_old, n_new
        Numbers of dimensions.
    """

    def __init__(self, n_old: int, n_new: int) -> None:
        dimensions = max(n_old, n_new)
        self.n_cells = 0
        self._origin: tuple[Values, Values] | None = None  # subtracted before squaring, to avoid cancellation
        self._sums = np.zeros((2, dimensions))
        self._squares = np.zeros(2)
        self._products = np.zeros((dimensions, dimensions))

    def add(self, old: Points, new: Points) -> None:
        """Add cells: finite positions in both embeddings, (cells, dimensions) each."""
        if not len(old):
            return
        both = [_padded(points, len(self._products)) for points in (old, new)]
        if self._origin is None:
            self._origin = (both[0].mean(axis=0), both[1].mean(axis=0))
        first, second = (points - origin for points, origin in zip(both, self._origin, strict=True))
        self.n_cells += len(first)
        self._sums += first.sum(axis=0), second.sum(axis=0)
        self._squares += np.square(first).sum(), np.square(second).sum()
        self._products += first.T @ second

    def superposition(self) -> Superposition:
        """The best superposition of the cells added so far, of which there must be one or more."""
        assert self._origin is not None, "cells were added"
        means = self._sums / self.n_cells
        products = self._products - self.n_cells * np.outer(*means)
        old, new = np.maximum(self._squares - self.n_cells * np.square(means).sum(axis=1), 0.0)
        # orthogonal_procrustes(A, B) needs A and B only as the product A.T @ B.
        matrix, singular = orthogonal_procrustes(np.eye(len(products)), products)
        scale = float(singular) / old if old > 0 else 0.0
        centers = [mean + origin for mean, origin in zip(means, self._origin, strict=True)]
        return Superposition(matrix, scale, centers[0], centers[1], float(np.sqrt(new / self.n_cells)))


def _padded(points: Points, dimensions: int) -> Values:
    """Points as float64, with dimensions of zeros up to `dimensions`."""
    values = np.zeros((len(points), dimensions))
    values[:, : points.shape[1]] = points
    return values


def shares_of_neighbors(one: Positions, other: Positions) -> Values:
    """Share of each cell's neighbors that are the same in two embeddings, float64 (cells,).

    Parameters
    ----------
    one, other
        int64 (cells, neighbors): positions of the neighbors of each cell, without repetition.
    """
    return common_neighbors(one, other) / max(one.shape[1], 1)


def labels_of_neighbors(neighbors: Positions, codes: Codes) -> Codes:
    """Most frequent label of each cell's neighbors, int64 (cells,); of several, the first code; -1: none has a label.

    Parameters
    ----------
    neighbors
        int64 (cells, neighbors): positions of the neighbors.
    codes
        int64 (cells,): label of each cell; -1: unknown, it does not count.
    """
    of_neighbors = codes[neighbors]
    rows, columns = np.nonzero(of_neighbors >= 0)
    if not len(rows):
        return np.full(len(neighbors), -1, np.int64)
    shape = (len(neighbors), int(codes.max()) + 1)
    votes = sp.csr_matrix((np.ones(len(rows), np.int32), (rows, of_neighbors[rows, columns])), shape=shape)
    found = np.asarray(votes.argmax(axis=1), np.int64).ravel()
    found[np.asarray(votes.sum(axis=1)).ravel() == 0] = -1
    return found


def chance_of_agreement(one: Codes, other: Codes) -> float:
    """Expected share of equal labels if the cells of one annotation are shuffled; -1, unknown, is excluded."""
    size = int(max(one.max(initial=0), other.max(initial=0))) + 1
    shares = [np.bincount(codes[codes >= 0], minlength=size) / max((codes >= 0).sum(), 1) for codes in (one, other)]
    return float(shares[0] @ shares[1])
