"""The posterior of all cells on disk, filled block by block; a killed run continues at the first missing block."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from census_scvi.config.run_names import PROGRESS
from census_scvi.errors import UserError
from census_scvi.files.atomic import sync, write_json
from census_scvi.files.json_file import read_json
from census_scvi.model.encode import Latent


class LatentStore:
    """Four .npy files of known size: means, variances and library sizes of the posterior, hashes of the counts.

    Parameters
    ----------
    folder
        Where they lie.
    n_cells, n_latent
        Their shape.
    """

    def __init__(self, folder: Path, n_cells: int, n_latent: int) -> None:
        self._folder = folder
        self._files = {
            "latent": ("<f4", (n_cells, n_latent)),
            "variance": ("<f4", (n_cells, n_latent)),
            "library_size": ("<f4", (n_cells,)),
            "latent-hash": ("<u8", (n_cells,)),
        }
        self.cells_done = self._progress(folder / PROGRESS, n_cells)
        if not self.cells_done:
            for name in self._files:
                self._create(name)

    @staticmethod
    def _progress(path: Path, n_cells: int) -> int:
        if not path.exists():
            return 0
        try:
            done = int(read_json(path)["cells"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{path} is damaged ({error}); --force embeds all cells again") from None
        if not 0 <= done <= n_cells:
            raise UserError(f"{path} records {done:,} of {n_cells:,} cells; --force embeds all cells again")
        return done

    def path(self, name: str) -> Path:
        """Path of one of the files."""
        return self._folder / f"{name}.npy"

    def append(self, latent: Latent, hashes: npt.NDArray[np.uint64]) -> None:
        """Write the next cells and the hashes of their counts; they count as done only when they are on the disk."""
        values: dict[str, npt.NDArray[Any]] = {
            "latent": latent.mean,
            "variance": latent.variance,
            "library_size": latent.library_size,
            "latent-hash": hashes,
        }
        for name, array in values.items():
            with self.path(name).open("r+b") as file:
                # Plain writes: a memory map would meet a full disk with SIGBUS instead of an error.
                file.seek(self._offset(name) + self.cells_done * array[0].nbytes)
                file.write(np.ascontiguousarray(array, dtype=self._files[name][0]).tobytes())
                file.flush()
                os.fsync(file.fileno())
        self.cells_done += len(latent.mean)
        write_json(self._folder / PROGRESS, {"cells": self.cells_done})

    def read(self, rows: slice | np.ndarray) -> Latent:
        """Posterior of some cells."""
        mean, variance, library_size = (
            np.array(np.load(self.path(name), mmap_mode="r")[rows]) for name in ("latent", "variance", "library_size")
        )
        return Latent(mean, variance, library_size)

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
