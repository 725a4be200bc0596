"""Order of the cells in the prepared file: shuffled, so that neighbours come from the whole Census.

Neighbouring cells of the Census are of one dataset and mostly of one donor. Runs of them, which are read at
low cost, are sampled from the whole Census into pools; each pool is shuffled and written. What the loader reads in one
piece, a small part of a pool, holds cells of all its runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from census_scvi.config.random_streams import Stream, generator

Run = tuple[int, int]
# Runs of about 2,000 cells that are kept in memory and shuffled.
POOL_RUNS = 8


@dataclass(frozen=True)
class Pool:
    """Runs of cells that are shuffled together.

    Attributes
    ----------
    runs
        First cell of each, and the one after its last: positions among the selected cells, ascending.
    """

    runs: list[Run]
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.runs)

    def cells(self) -> npt.NDArray[np.int64]:
        """The cells of its runs, one run after another."""
        return np.concatenate([np.arange(*run) for run in self.runs])

    def order(self) -> npt.NDArray[np.int64]:
        """In which order the cells of the runs, one run after another, are written."""
        return np.random.default_rng(self.seed).permutation(len(self))


def pools(runs: list[Run], seed: int) -> Iterator[Pool]:
    """The pools of a file, each run in exactly one; a function of the runs and the seed."""
    order = generator(seed, Stream.RUNS_OF_FILE).permutation(len(runs))
    for number, first in enumerate(range(0, len(runs), POOL_RUNS)):
        yield Pool(sorted(runs[i] for i in order[first : first + POOL_RUNS]), (seed, Stream.CELLS_OF_POOL, number))
