"""The posterior of all cells on disk, filled block by block; a killed run goes on at the first missing block."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from census_scvi.model.encode import Latent
from census_scvi.workspace.atomic import sync, write_json

PROGRESS = "progress.json"


class LatentStore:
    """Three .npy files of known size: `latent.npy` (means), `variance.npy`, `library_size.npy`.

    Parameters
    ----------
    folder
        Where they lie.
    n_cells, n_latent
        Their shape.
    """

    def __init__(self, folder: Path, n_cells: int, n_latent: int) -> None:
        self._folder = folder
        self._shapes = {
            "latent": (n_cells, n_latent),
            "variance": (n_cells, n_latent),
            "library_size": (n_cells,),
        }
        progress = folder / PROGRESS
        self.cells_done = json.loads(progress.read_text())["cells"] if progress.exists() else 0
        if not self.cells_done:
            for name, shape in self._shapes.items():
                self._create(name, shape)

    def path(self, name: str) -> Path:
        """Path of one of the files."""
        return self._folder / f"{name}.npy"

    def append(self, latent: Latent) -> None:
        """Write the next cells; they count as done only when they are on the disk."""
        values = {"latent": latent.mean, "variance": latent.variance, "library_size": latent.library_size}
        for name, array in values.items():
            with self.path(name).open("r+b") as file:
                # Plain writes: a memory map would meet a full disk with SIGBUS instead of an error.
                file.seek(self._offset(name) + self.cells_done * array[0].nbytes)
                file.write(np.ascontiguousarray(array, dtype="<f4").tobytes())
                file.flush()
                os.fsync(file.fileno())
        self.cells_done += len(latent.mean)
        write_json(self._folder / PROGRESS, {"cells": self.cells_done})

    def read(self, rows: slice | np.ndarray) -> Latent:
        """Posterior of some cells."""
        arrays = {name: np.array(np.load(self.path(name), mmap_mode="r")[rows]) for name in self._shapes}
        return Latent(arrays["latent"], arrays["variance"], arrays["library_size"])

    def _create(self, name: str, shape: tuple[int, ...]) -> None:
        with self.path(name).open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 4 * int(np.prod(shape)))
        sync(self.path(name))

    def _offset(self, name: str) -> int:
        return self.path(name).stat().st_size - 4 * int(np.prod(self._shapes[name]))
