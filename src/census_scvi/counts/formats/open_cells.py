"""Open a file or folder of cells; the format is recognised by its content."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py

from census_scvi.counts.formats.loom import is_loom, read_loom
from census_scvi.counts.formats.stored import StoredCells
from census_scvi.counts.formats.table import is_table, read_table
from census_scvi.counts.formats.ten_x import is_ten_x, read_ten_x, read_ten_x_folder
from census_scvi.counts.formats.zarr_store import open_zarr
from census_scvi.counts.h5ad import open_hdf5, read_frame, require_h5ad
from census_scvi.counts.other_formats import FORMATS, check_cells_path, explain_path, folder_of_mtx, is_zarr
from census_scvi.counts.raw_counts import matrices_in, var_key
from census_scvi.errors import UserError

_HDF5 = (".h5ad", ".h5", ".hdf5", ".loom")


def open_cells(path: Path, stack: ExitStack) -> StoredCells:
    """Open cells.

    Parameters
    ----------
    path
        .h5ad, zarr store, 10x .h5 (of Cell Ranger 2 or later), folder with matrix.mtx, barcodes.tsv and features.tsv
        (any may be gzipped) or that matrix.mtx, Loom file, or table of cells x genes (CSV or TSV, may be gzipped).
        Tables and .mtx files are read into memory as sparse matrices; the other formats are read in blocks.
    stack
        Closes the file.

    Raises
    ------
    UserError
        The file is missing, damaged or of another format.
    """
    check_cells_path(path)
    if path.is_dir() and is_zarr(path):
        return _anndata_layout(open_zarr(path))
    if folder := folder_of_mtx(path):
        return read_ten_x_folder(folder)
    if h5py.is_hdf5(path):
        file = stack.enter_context(open_hdf5(path))
        if is_loom(file):
            return read_loom(file)
        if is_ten_x(file):
            return read_ten_x(file)
        require_h5ad(file)
        return _anndata_layout(file)
    if is_table(path):
        return read_table(path)
    explained = explain_path(path)
    if not explained and path.suffix in _HDF5:
        explained = f"not a complete {path.suffix} file"
    raise UserError(f"{path}: {explained or f'is not {FORMATS}'}")


def _anndata_layout(file: Any) -> StoredCells:
    """Cells of an .h5ad or of a zarr store, which have the same layout."""
    obs, matrices, var = read_frame(file, "obs"), matrices_in(file), read_frame(file, "var")
    raw_var = read_frame(file, var_key(file, "raw")) if "raw" in matrices else var
    return StoredCells(obs, matrices, var, raw_var, file)
