"""The posterior of all cells on disk, written block by block; a killed run continues at the first missing block.

Several processes can each write a part with its own files and progress record; `join_latent` joins the parts into the
store of all cells. With one process the store has one part, and nothing is joined.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from census_scvi.config.run_names import PROGRESS
from census_scvi.errors import UserError
from census_scvi.files.atomic import remove, sync, write_json
from census_scvi.files.json_file import read_json
from census_scvi.files.parts import WHOLE, Part, parts
from census_scvi.model.encode import Latent

_COPIED_BYTES = 16 * 2**20


class LatentStore:
    """Four .npy files of fixed size: means, variances and library sizes of the posterior, and hashes of the counts.

    Parameters
    ----------
    folder
        Folder of the files.
    n_cells, n_latent
        Number of cells of the part, and latent dimensions.
    part
        The part of the cells in this store; default: all cells.
    """

    def __init__(self, folder: Path, n_cells: int, n_latent: int, part: Part = WHOLE) -> None:
        self._folder, self._part = folder, part
        self._files = {
            "latent": ("<f4", (n_cells, n_latent)),
            "variance": ("<f4", (n_cells, n_latent)),
            "library_size": ("<f4", (n_cells,)),
            "latent-hash": ("<u8", (n_cells,)),
        }
        self.n_cells = n_cells
        self.cells_done = self._progress()
        if not self.cells_done:
            for name in self._files:
                self._create(name)

    def _progress(self) -> int:
        path = self._record
        if not path.exists():
            return 0
        try:
            done = int(read_json(path)["cells"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{path} is damaged ({error}); --force embeds all cells again") from None
        if not 0 <= done <= self.n_cells:
            raise UserError(f"{path} records {done:,} of {self.n_cells:,} cells; --force embeds all cells again")
        return done

    @property
    def _record(self) -> Path:
        return self._folder / self._part.name(PROGRESS)

    def path(self, name: str) -> Path:
        """Path of one of the files."""
        return self._folder / self._part.name(f"{name}.npy")

    def append(self, latent: Latent, hashes: npt.NDArray[np.uint64]) -> None:
        """Write the next cells and the hashes of their counts; they count as done after they are synced to disk."""
        values: dict[str, npt.NDArray[Any]] = {
            "latent": latent.mean,
            "variance": latent.variance,
            "library_size": latent.library_size,
            "latent-hash": hashes,
        }
        for name, array in values.items():
            with self.path(name).open("r+b") as file:
                # Plain writes, because a memory map gets SIGBUS instead of an error on a full disk.
                file.seek(self._offset(name) + self.cells_done * array[0].nbytes)
                file.write(np.ascontiguousarray(array, dtype=self._files[name][0]).tobytes())
                file.flush()
                os.fsync(file.fileno())
        self.cells_done += len(latent.mean)
        write_json(self._record, {"cells": self.cells_done})

    def read(self, rows: slice | np.ndarray) -> Latent:
        """Posterior of some cells."""
        mean, variance, library_size = (
            np.array(np.load(self.path(name), mmap_mode="r")[rows]) for name in ("latent", "variance", "library_size")
        )
        return Latent(mean, variance, library_size)

    def fill_from(self, others: list[LatentStore]) -> None:
        """Copy the cells of other stores, in this order; together they must have all cells of this store."""
        for name in self._files:
            with self.path(name).open("r+b") as file:
                file.seek(self._offset(name))
                for other in others:
                    with other.path(name).open("rb") as source:
                        source.seek(other._offset(name))
                        shutil.copyfileobj(source, file, _COPIED_BYTES)
                file.flush()
                os.fsync(file.fileno())
        self.cells_done = self.n_cells
        write_json(self._record, {"cells": self.cells_done})

    def remove(self) -> None:
        """Delete the files, first the progress record."""
        for path in (self._record, *map(self.path, self._files)):
            remove(path)

    def _create(self, name: str) -> None:
        kind, shape = self._files[name]
        with self.path(name).open("wb") as file:
            header = {"descr": kind, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + self._size(name))
        sync(self.path(name))

    def _offset(self, name: str) -> int:
        return self.path(name).stat().st_size - self._size(name)

    def _size(self, name: str) -> int:
        kind, shape = self._files[name]
        return np.dtype(kind).itemsize * int(np.prod(shape))


def join_latent(folder: Path, sizes: list[int], n_latent: int) -> LatentStore:
    """Join the parts to the store of all cells; can be repeated after a kill at any point.

    Parameters
    ----------
    folder
        Folder of the files.
    sizes
        Number of cells of each part.
    n_latent
        Latent dimensions.

    Raises
    ------
    UserError
        A part is not complete.
    """
    whole = LatentStore(folder, sum(sizes), n_latent)
    if len(sizes) == 1:
        return whole
    stores = [LatentStore(folder, size, n_latent, part) for part, size in zip(parts(len(sizes)), sizes, strict=True)]
    if whole.cells_done < whole.n_cells:
        for part, store in zip(parts(len(sizes)), stores, strict=True):
            if store.cells_done < store.n_cells:
                raise UserError(
                    f"{part} in {folder} has {store.cells_done:,} of {store.n_cells:,} cells; finish it before the"
                    " parts are joined"
                )
        whole.fill_from(stores)
    for store in stores:
        store.remove()
    return whole
