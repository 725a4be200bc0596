"""Order of the cells in the prepared file: shuffled, so that adjacent cells come from the whole Census.

Adjacent cells of the Census belong to one dataset and mostly to one donor. Runs of adjacent cells are fast to read.
Each pool consists of runs that are sampled from the whole Census; its cells are shuffled and written. The loader reads
a small part of a pool at a time, which contains cells of all runs of the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from census_scvi.config.random_streams import Stream, generator

Run = tuple[int, int]
# Number of runs, about 2,000 cells each, that are shuffled together in memory.
POOL_RUNS = 8


@dataclass(frozen=True)
class Pool:
    """Runs of cells that are shuffled together.

    Attributes
    ----------
    runs
        First cell, and the cell after the last, of each run: positions among the selected cells, ascending.
    seed
        Seed of the order of the cells.
    """

    runs: list[Run]
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.runs)

    def cells(self) -> npt.NDArray[np.int64]:
        """Cells of the runs, one run after another, int64 (cells,)."""
        return np.concatenate([np.arange(*run) for run in self.runs])

    def order(self) -> npt.NDArray[np.int64]:
        """Order in which the cells are written: positions in `cells()`, int64 (cells,)."""
        return np.random.default_rng(self.seed).permutation(len(self))


def pools(runs: list[Run], seed: int) -> Iterator[Pool]:
    """Pools of a file. Each run is in exactly one pool; the pools depend on the runs and the seed only."""
    order = generator(seed, Stream.RUNS_OF_FILE).permutation(len(runs))
    for number, first in enumerate(range(0, len(runs), POOL_RUNS)):
        yield Pool(sorted(runs[i] for i in order[first : first + POOL_RUNS]), (seed, Stream.CELLS_OF_POOL, number))
