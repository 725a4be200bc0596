"""The shuffled prepared cells on disk, written in portions; a killed run resumes at the first missing portion.

Each portion is a file; it is complete if the file exists. Any process may write any part of the portions. Their
contents do not depend on the process, so the joined file does not either.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem

from census_scvi.config.run_names import PART, PROTEINS
from census_scvi.counts.file_order import Pool, Run, pools
from census_scvi.counts.reader import PreparedCells
from census_scvi.counts.writer import H5adWriter
from census_scvi.errors import UserError
from census_scvi.files.atomic import sync
from census_scvi.files.parts import WHOLE, Part, parts
from census_scvi.files.readahead import read_ahead

# Pools per portion: a killed run loses at most about 200,000 cells, or one minute of work.
PART_POOLS = 12


class PreparedStore:
    """A standard .h5ad of all cells, joined from portions that are .h5ad files, too.

    Parameters
    ----------
    target
        Path of the complete file; its portions are in the same folder.
    runs
        Runs of cells that are read together: first cell, and cell after the last.
    seed
        Seed of the order of the cells (see `file_order`).
    writer
        Creates a writer for a path.
    n_parts
        Number of parts of the work; the complete file is the same for any number, its portions are not.
    """

    def __init__(
        self, target: Path, runs: list[Run], seed: int, writer: Callable[[Path], H5adWriter], n_parts: int = 1
    ) -> None:
        self._target, self._writer = target, writer
        every = list(pools(runs, seed))
        of_parts = {part: _groups(part.take(every)) for part in parts(n_parts)}
        numbers = itertools.count()
        self._portions = {
            part: {target.with_name(PART.format(next(numbers))): group for group in groups}
            for part, groups in of_parts.items()
        }

    def n_cells(self, part: Part = WHOLE) -> int:
        """Number of cells of a part."""
        return sum(len(pool) for group in self._of(part).values() for pool in group)

    def missing(self, part: Part = WHOLE) -> list[Pool]:
        """Pools of a part that are not on disk yet, in the order in which `fill` expects them."""
        return [pool for group in self._missing(part).values() for pool in group]

    def fill(
        self,
        counts: Iterator[sp.csr_matrix],
        obs: Iterator[pd.DataFrame],
        part: Part = WHOLE,
        *,
        proteins: Iterator[npt.NDArray[np.float32]] | None = None,
    ) -> Iterator[int]:
        """Write the missing portions of a part; yields the number of cells of each pool after it is written.

        Parameters
        ----------
        counts
            Counts of each run of each missing pool, in order.
        obs
            obs of the cells of each missing pool, in order.
        part
            The part; two processes must not fill the same part at the same time.
        proteins
            Counts of proteins of the cells of each missing pool, float32 (cells, proteins), in order; None: none.
        """
        for path, group in self._missing(part).items():
            with self._whole(path) as writer:
                for pool in group:
                    order = pool.order()
                    shuffled = sp.vstack([next(counts) for _ in pool.runs])[order]
                    obsm = {PROTEINS: next(proteins)[order]} if proteins else None
                    writer.append(next(obs).iloc[order], counts=shuffled, obsm=obsm)
                    yield len(order)

    def join(self) -> None:
        """Join the portions to the complete file; UserError if a portion is missing."""
        if self._target.exists():
            return
        portions = self._of(WHOLE)
        if missing := self._missing(WHOLE):
            raise UserError(
                f"{len(missing):,} of {len(portions):,} portions of {self._target.name} are missing in"
                f" {self._target.parent}; finish their parts before they are joined"
            )
        if len(portions) == 1:
            next(iter(portions)).rename(self._target)
            return
        written = (each for path, group in portions.items() for each in _read(path, group))
        n_pools = sum(map(len, portions.values()))
        with self._whole(self._target) as writer:
            for obs, counts, obsm in read_ahead(lambda _: next(written), range(n_pools), workers=1):
                writer.append(obs, counts=counts, obsm=obsm)

    def _of(self, part: Part) -> dict[Path, list[Pool]]:
        """Portions of a part, and the pools in each."""
        mine = self._portions.values() if part == WHOLE else [self._portions[part]]
        return {path: group for portions in mine for path, group in portions.items()}

    def _missing(self, part: Part) -> dict[Path, list[Pool]]:
        if self._target.exists():
            return {}
        return {path: group for path, group in self._of(part).items() if not path.exists()}

    @contextmanager
    def _whole(self, path: Path) -> Iterator[H5adWriter]:
        """Write a file under a temporary name, and rename it when it is complete."""
        partial = path.with_name(path.name + ".partial")
        with self._writer(partial) as writer:
            yield writer
        sync(partial)
        partial.replace(path)


def _groups(mine: Sequence[Pool]) -> list[list[Pool]]:
    return [list(mine[first : first + PART_POOLS]) for first in range(0, len(mine), PART_POOLS)]


def _read(
    path: Path, group: list[Pool]
) -> Iterator[tuple[pd.DataFrame, sp.csr_matrix, dict[str, npt.NDArray[np.float32]]]]:
    """The pools of a portion, one at a time: the joined file has the same bytes for any portions."""
    with h5py.File(path, "r") as file:
        obs = read_elem(file["obs"])
    cells = PreparedCells(path)
    for start, stop in itertools.pairwise([0, *np.cumsum([len(pool) for pool in group]).tolist()]):
        obsm = {PROTEINS: cells.protein_counts(start, stop)} if cells.proteins else {}
        yield obs.iloc[start:stop], cells.read([(start, stop)]).csr(cells.n_genes), obsm
    cells.close()


def count_nonzeros(path: Path) -> tuple[int, int]:
    """Number of non-zeros of a prepared file, and number of cells without non-zeros."""
    with h5py.File(path, "r") as file:
        row_ends = file["X/indptr"]
        empty = 0
        for start in range(0, len(row_ends) - 1, 2**20):
            empty += int((np.diff(row_ends[start : start + 2**20 + 1]) == 0).sum())
        return int(row_ends[-1]), empty
