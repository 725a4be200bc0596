"""Copy cells of any format to a new .h5ad."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem

from census_scvi.counts.formats.open_cells import open_cells
from census_scvi.counts.formats.zarr_store import open_zarr
from census_scvi.counts.h5ad import portable_frame
from census_scvi.counts.other_formats import is_zarr
from census_scvi.counts.raw_counts import Matrix

log = logging.getLogger(__name__)

_ROWS = 4096
# Parts of an AnnData that only .h5ad files and zarr stores have in addition to matrices and tables.
_OTHER_PARTS = ("obsm", "varm", "obsp", "varp", "uns")


def copy_as_h5ad(source: Path, target: Path) -> None:
    """Write the cells of a file or folder to a new .h5ad; an .h5ad is copied as it is.

    Matrices of other formats become CSR, in blocks of rows; gene and cell tables are kept, of a zarr store all parts.
    """
    if source.is_file() and h5py.is_hdf5(source):
        with h5py.File(source) as file:
            is_h5ad = {"obs", "var"} <= set(file)
        if is_h5ad:
            shutil.copyfile(source, target)
            return
    with ExitStack() as stack:
        cells = open_cells(source, stack)
        file = stack.enter_context(h5py.File(target, "w"))
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_elem(file, "obs", portable_frame(cells.obs))
        write_elem(file, "var", portable_frame(cells.var))
        for name in ("layers", *_OTHER_PARTS):
            write_elem(file, name, {})
        for place, matrix in cells.matrices.items():
            _append(file, "raw/X" if place == "raw" else place, matrix)
        if "raw" in cells.matrices:
            write_elem(file["raw"], "var", portable_frame(cells.raw_var))
        if source.is_dir() and is_zarr(source):
            store = open_zarr(source)
            for name in set(_OTHER_PARTS) & set(store):
                write_elem(file, name, ad.io.read_elem(store[name]))


def copy_with_results(
    source: Path, target: Path, obs: pd.DataFrame, obsm: Mapping[str, Any], uns: Mapping[str, Any]
) -> None:
    """Write a copy of the cells with results added.

    Parameters
    ----------
    source, target
        As for `copy_as_h5ad`.
    obs
        Replaces the table of the cells.
    obsm, uns
        Added; a member of obsm with the same name is kept as `<name>_before`.
    """
    copy_as_h5ad(source, target)
    with h5py.File(target, "r+") as file:
        write_elem(file, "obs", portable_frame(obs))
        for group in ("obsm", "uns"):
            if group not in file:
                write_elem(file, group, {})
        for name, values in obsm.items():
            if name in file["obsm"]:
                kept = f"{name}_before"
                log.warning("obsm[%r] of the file is kept as obsm[%r]", name, kept)
                file["obsm"].move(name, kept)
            write_elem(file["obsm"], name, np.asarray(values))
        for name, content in uns.items():
            write_elem(file["uns"], name, _storable(content))


def _storable(values: Any) -> Any:
    """Convert lists to arrays, as .h5ad files require, and text of tables to a form that every anndata reads."""
    if isinstance(values, Mapping):
        return {name: _storable(value) for name, value in values.items()}
    if isinstance(values, pd.DataFrame):
        return portable_frame(values)
    return np.array(values, dtype=object) if isinstance(values, list) else values


def _append(file: h5py.File, key: str, matrix: Matrix) -> None:
    for number, (_, block) in enumerate(matrix.blocks(_ROWS)):
        if number:
            ad.io.sparse_dataset(file[key]).append(block)
        else:
            write_elem(file, key, block)
