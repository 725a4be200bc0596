"""In which order the prepared file holds the cells: shuffled, so that neighbours come from all over the Census.

Cells that lie side by side in the Census are of one dataset and mostly of one donor. Runs of them, which are read at
little cost, are drawn from all of it into pools; each pool is shuffled and written. What the loader then reads in one
piece, a small part of a pool, holds cells of all its runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Consecutive cells read together, and how many such runs are held in memory and shuffled.
RUN_CELLS = 2048
POOL_RUNS = 8


@dataclass(frozen=True)
class Pool:
    """Runs of cells that are shuffled together.

    Attributes
    ----------
    starts
        First cell of each run, ascending: a position in the selection of `n_cells` cells.
    """

    starts: list[int]
    n_cells: int
    seed: tuple[int, ...]

    def sizes(self) -> list[int]:
        """Cells of each run."""
        return [min(RUN_CELLS, self.n_cells - start) for start in self.starts]

    def order(self) -> npt.NDArray[np.int64]:
        """In which order the cells of the runs, one run after another, are written."""
        return np.random.default_rng(self.seed).permutation(sum(self.sizes()))


def pools(n_cells: int, seed: int) -> Iterator[Pool]:
    """The pools of a file, each cell in exactly one; a function of the number of cells and the seed."""
    # The numbers behind the seed keep these random numbers apart from those of the split and of the epochs.
    runs = np.random.default_rng([seed, 3]).permutation(np.arange(0, n_cells, RUN_CELLS))
    for number, first in enumerate(range(0, len(runs), POOL_RUNS)):
        yield Pool(sorted(runs[first : first + POOL_RUNS].tolist()), n_cells, (seed, 4, number))
