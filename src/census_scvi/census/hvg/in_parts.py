"""Selection of genes by several processes: each reads parts of the cells, and writes what it counts to a folder.

The last part that is read completes the selection. It may need a second pass over the counts.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from census_scvi.census.cells import Cells
from census_scvi.census.hvg.select import Fit, Masks, fit, read_again, tally_genes
from census_scvi.census.hvg.tally import GeneTally
from census_scvi.census.open import Census
from census_scvi.errors import UserError
from census_scvi.files.atomic import new_file, replacing
from census_scvi.files.parts import Part, parts

_TALLY, _RECOUNT = "tally.npz", "recount.npy"


class SelectionInParts:
    """One selection of genes; several processes may read different parts at the same time.

    Parameters
    ----------
    census
        The open Census.
    cells
        The cells, and the batches in which genes are ranked.
    folder
        Folder for what the parts count.
    n_top, seed, min_cells
        As in `select_in_one_pass`.
    """

    def __init__(self, census: Census, cells: Cells, folder: Path, n_top: int, seed: int, min_cells: int) -> None:
        self._census, self._cells, self._folder = census, cells, folder
        self._n_top, self._seed, self._min_cells = n_top, seed, min_cells

    def read(self, part: Part) -> bool:
        """Read the counts of a part, unless this is done; whether something was read."""
        tally, again = self._folder / part.name(_TALLY), self._folder / part.name(_RECOUNT)
        if not tally.exists():
            counted, batches = tally_genes(self._census, self._cells, part)
            _write(tally, lambda file: counted.save(file, batches))
            return True
        if self._fit.exists() and not again.exists():
            recount = read_again(self._census, self._cells, self._load(Fit.load, self._fit), part)
            _write(again, lambda file: np.save(file, recount))
            return True
        return False

    def select(self, n_parts: int) -> Masks | None:
        """The genes; None if parts must be read, or read again. Only one process at a time.

        ValueError if a fit fails despite the jitter.
        """
        tallies, recounts = ([self._folder / part.name(name) for part in parts(n_parts)] for name in (_TALLY, _RECOUNT))
        if self._fit.exists():
            if not all(path.exists() for path in recounts):
                return None
            found = self._load(Fit.load, self._fit)
            found.complete(sum(self._load(np.load, path) for path in recounts))
            return found.select(self._n_top)
        if not all(path.exists() for path in tallies):
            return None
        whole = None
        for path in tallies:
            tally, batches = self._load(GeneTally.load, path)
            whole = whole or GeneTally(len(self._cells.batches), len(tally.cells), kept=tally.largest.shape[2])
            whole.merge(tally, batches)
        assert whole is not None, "there is at least one part"
        result = fit(whole, self._cells, self._n_top, self._seed, self._min_cells)
        if not isinstance(result, Fit):
            return result
        if result.again.any():
            _write(self._fit, result.save)
            return None
        return result.select(self._n_top)

    @property
    def _fit(self) -> Path:
        """File that exists if parts must be read again."""
        return self._folder / "fit.npz"

    def _load(self, load: Callable[[BinaryIO], Any], path: Path) -> Any:
        try:
            with path.open("rb") as file:
                return load(file)
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); --force without --part selects the genes again") from None


def _write(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    with replacing([path]) as (partial,), new_file(partial, "wb") as file:
        write(file)
