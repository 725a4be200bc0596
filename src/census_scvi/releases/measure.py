"""Measures of how the shared cells moved: on all cells in blocks, and on a sample with its neighbors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.census.slices import Embedding, Joinids, Values
from census_scvi.config.random_streams import Stream, draw, generator
from census_scvi.errors import UserError
from census_scvi.metrics.agreement import NEIGHBORS
from census_scvi.metrics.drift import (
    Codes,
    Procrustes,
    Superposition,
    chance_of_agreement,
    labels_of_neighbors,
    shares_of_neighbors,
)
from census_scvi.metrics.interval import interval
from census_scvi.neighbors.index import NeighborIndex
from census_scvi.releases.cells import Rows, Shared
from census_scvi.terminal.progress import progress_bar

log = logging.getLogger(__name__)

_BLOCK_CELLS = 2**16
# A group has values of neighbors if this number of its cells is sampled.
FEWEST_SAMPLED = 10
# Measures of the sampled cells, 0 to 1, of which a lower value is worse.
SAMPLED = ("neighbor_overlap", "label_stability", "old_accuracy", "new_accuracy")


@dataclass(frozen=True)
class Moved:
    """Positions of the shared cells, compared.

    Attributes
    ----------
    cells
        int64 (measured cells,): positions among the shared cells, of those that both embeddings have.
    movement
        float32 (measured cells,): distance after the best superposition, in units of the spread of the new embedding.
    superposition
        The superposition.
    sample
        int64 (sampled cells,): positions among the shared cells, in ascending order of the new soma_joinid.
    old, new
        float32 (sampled cells, dimensions): positions of the sampled cells.
    """

    cells: Rows
    movement: Values
    superposition: Superposition
    sample: Rows
    old: Values
    new: Values


def measure_movement(shared: Shared, old: Embedding, new: Embedding, sampled_cells: int, seed: int) -> Moved:
    """Superpose the embeddings of the shared cells and measure how far each cell moved, in two passes of blocks.

    Raises
    ------
    UserError
        Fewer than two cells have a position in both embeddings.
    """
    fit = Procrustes(old.n_latent, new.n_latent)
    used = []
    for start, one, other in _blocks(shared, old, new, "superposition"):
        kept = _finite(one) & _finite(other)
        fit.add(one[kept], other[kept])
        used.append(start + np.flatnonzero(kept))
    cells = np.concatenate(used)
    if len(cells) < 2:
        raise UserError(
            f"{old.name} and {new.name} have positions of {len(cells)} of {len(shared):,} cells of both releases; two"
            " or more are needed"
        )
    superposition = fit.superposition()
    sample = cells[draw(len(cells), sampled_cells, generator(seed, Stream.COMPARED_CELLS))]
    positions = [np.empty((len(sample), each.n_latent), np.float32) for each in (old, new)]
    movement = []
    for start, one, other in _blocks(shared, old, new, "movement"):
        stop = start + len(one)
        rows = cells[np.searchsorted(cells, start) : np.searchsorted(cells, stop)] - start
        movement.append(superposition.movement(one[rows], other[rows]).astype(np.float32))
        places = slice(*np.searchsorted(sample, [start, stop]))
        for target, block in zip(positions, (one, other), strict=True):
            target[places] = block[sample[places] - start]
    order = np.argsort(shared.new_rows[sample], kind="stable")
    return Moved(cells, np.concatenate(movement), superposition, sample[order], *(each[order] for each in positions))


def _blocks(shared: Shared, old: Embedding, new: Embedding, what: str) -> Iterator[tuple[int, Values, Values]]:
    """First cell of each block of shared cells, and their positions in both embeddings; NaN: not embedded."""
    with progress_bar(len(shared), what) as bar:
        for start in range(0, len(shared), _BLOCK_CELLS):
            some = slice(start, start + _BLOCK_CELLS)
            one = _positions(old, shared.old.joinids[shared.old_rows[some]])
            yield start, one, _positions(new, shared.new.joinids[shared.new_rows[some]])
            bar.update(len(one))


def _positions(embedding: Embedding, joinids: Joinids) -> Values:
    """Positions of cells in any order, float32 (cells, dimensions); NaN for a cell that is not embedded."""
    order = np.argsort(joinids, kind="stable")
    ascending = joinids[order]
    positions = np.full((len(joinids), embedding.n_latent), np.nan, np.float32)
    for found, values in embedding.read(ascending):
        positions[order[np.searchsorted(ascending, found)]] = values
    return positions


def _finite(positions: Values) -> npt.NDArray[np.bool_]:
    return np.asarray(np.isfinite(positions).all(axis=1))


@dataclass(frozen=True)
class Sampled:
    """Measures of the sampled cells, and what they are under chance.

    Attributes
    ----------
    values
        One row per sampled cell; columns of `SAMPLED`, NaN for a cell whose label is not known.
    chance
        Expected value of each column, and of `movement`, for cells that are shuffled in the new embedding.
    n_neighbors
        Neighbors per cell.
    """

    values: pd.DataFrame
    chance: dict[str, float]
    n_neighbors: int


def measure_sample(moved: Moved, codes: Codes, seed: int) -> Sampled:
    """Compare the neighbors of the sampled cells, and the labels of these neighbors.

    Parameters
    ----------
    moved
        Result of `measure_movement`.
    codes
        int64 (sampled cells,): label of each cell; -1: not known. Both embeddings are judged by these labels.
    seed
        Seed of the index and of the shuffled cells.
    """
    log.info("neighbors of %s cells in both embeddings", f"{len(codes):,}")
    one, other = (NeighborIndex(points, seed=seed).others(NEIGHBORS) for points in (moved.old, moved.new))
    votes = [labels_of_neighbors(neighbors, codes) for neighbors in (one, other)]
    known = (votes[0] >= 0) & (votes[1] >= 0)
    labelled = codes >= 0
    values = pd.DataFrame(
        {
            "neighbor_overlap": shares_of_neighbors(one, other),
            "label_stability": np.where(known, votes[0] == votes[1], np.nan),
            "old_accuracy": np.where(labelled, votes[0] == codes, np.nan),
            "new_accuracy": np.where(labelled, votes[1] == codes, np.nan),
        }
    )
    n_neighbors, shuffled = one.shape[1], generator(seed, Stream.COMPARED_CELLS, 1).permutation(len(codes))
    fit = Procrustes(moved.old.shape[1], moved.new.shape[1])
    fit.add(moved.old, moved.new[shuffled])
    known_codes = codes[labelled]
    chance = {
        "neighbor_overlap": n_neighbors / (len(codes) - 1),
        "label_stability": chance_of_agreement(votes[0][known], votes[1][known]),
        "old_accuracy": chance_of_agreement(votes[0][labelled], known_codes),
        "new_accuracy": chance_of_agreement(votes[1][labelled], known_codes),
        "movement": float(fit.superposition().movement(moved.old, moved.new[shuffled]).mean()),
    }
    return Sampled(values, chance, n_neighbors)


@dataclass(frozen=True)
class Drift:
    """All measures of the shared cells.

    Attributes
    ----------
    shared, moved, sampled
        The cells, their movement, and the measures of the sampled ones.
    """

    shared: Shared
    moved: Moved
    sampled: Sampled

    @cached_property
    def sampled_movement(self) -> Values:
        """Movement of the sampled cells."""
        return self.moved.movement[np.searchsorted(self.moved.cells, self.moved.sample)]

    def overall(self, donors: npt.NDArray[np.object_] | None, seed: int) -> dict[str, dict[str, Any]]:
        """Mean of each measure: `value`, 95 % interval `low` and `high` (bootstrap over donors), `chance`, `cells`."""
        found = {}
        columns = {name: self.sampled.values[name].to_numpy() for name in SAMPLED}
        for name, values in {**columns, "movement": self.sampled_movement.astype(np.float64)}.items():
            known = ~np.isnan(values)
            if not known.any():
                continue
            groups = None if donors is None else donors[known]
            low, high = interval(_mean(values[known]), groups, int(known.sum()), seed=seed)
            value = float(values[known].mean() if name in SAMPLED else self.moved.movement.mean(dtype=np.float64))
            cells = int(known.sum()) if name in SAMPLED else len(self.moved.cells)
            chance = self.sampled.chance[name]
            found[name] = {"value": value, "low": low, "high": high, "chance": chance, "cells": cells}
        return found

    def by(self, column: str, label: str) -> list[dict[str, Any]]:
        """Measures of each value of a column, the worst first.

        Parameters
        ----------
        column
            Column of the new release.
        label
            Column of the labels, for the share of cells with another label.

        Returns
        -------
        One row per value: `name`, `cells`, `movement` (all cells), `relabelled` (share), `sampled`, and the columns of
        `SAMPLED` (None if fewer than `FEWEST_SAMPLED` cells are sampled). The rows with the lowest overlap of neighbors
        come first; those without come last, by movement.
        """
        values = self.shared.new.labels[column][self.shared.new_rows]
        codes, size = values.codes[self.moved.cells], len(values.categories)
        known = codes >= 0
        cells = np.bincount(codes[known], minlength=size)
        changed = self.shared.relabelled(label)[self.moved.cells]
        frame = pd.DataFrame(
            {
                "cells": cells,
                "movement": _means(codes[known], self.moved.movement[known], cells),
                "relabelled": _means(codes[known], changed[known], cells),
            },
            index=values.categories,
        )
        sampled = self.sampled.values.groupby(values.codes[self.moved.sample])
        frame["sampled"] = sampled.size().reindex(range(size), fill_value=0).to_numpy()
        for name in SAMPLED:
            means = sampled[name].mean().reindex(range(size)).to_numpy()
            frame[name] = np.where(frame["sampled"] >= FEWEST_SAMPLED, means, np.nan)
        frame = frame[frame["cells"] > 0].rename_axis("name").reset_index()
        ranked = frame.sort_values(["neighbor_overlap", "movement"], ascending=[True, False], na_position="last")
        return ranked.to_dict("records")


def _mean(values: npt.NDArray[np.float64]) -> Callable[[Rows], float]:
    return lambda rows: float(values[rows].mean())


def _means(codes: npt.NDArray[np.integer], values: npt.NDArray[Any], cells: Rows) -> npt.NDArray[np.float64]:
    return np.bincount(codes, weights=values, minlength=len(cells)) / np.maximum(cells, 1)
