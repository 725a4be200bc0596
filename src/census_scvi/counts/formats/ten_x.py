"""Output of Cell Ranger: the .h5 file, and the folder with matrix.mtx, barcodes.tsv and features.tsv."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.io
import scipy.sparse as sp

from census_scvi.counts.array_matrix import ArrayMatrix
from census_scvi.counts.formats.stored import StoredCells
from census_scvi.counts.h5ad import CountMatrix
from census_scvi.counts.other_formats import find_named
from census_scvi.errors import UserError

_PARTS = {"data", "indices", "indptr", "shape", "barcodes"}
# Columns of var in the .h5 of Cell Ranger 3 and of Cell Ranger 2, by their name in the file.
_COLUMNS = {"id": "gene_ids", "name": "gene_symbols", "feature_type": "feature_types", "genome": "genome"}
_OLD_COLUMNS = {"genes": "gene_ids", "gene_names": "gene_symbols"}


def is_ten_x(file: h5py.File) -> bool:
    """Whether an HDF5 file is a count matrix of Cell Ranger."""
    return bool(_groups(file))


def _groups(file: h5py.File) -> list[str]:
    """Groups with a matrix: `matrix`, or one per genome in files of Cell Ranger 2."""
    return [name for name, group in file.items() if isinstance(group, h5py.Group) and set(group) >= _PARTS]


def read_ten_x(file: h5py.File) -> StoredCells:
    """Cells of an open .h5 file of Cell Ranger.

    Raises
    ------
    UserError
        Parts are missing or do not match, or the file has matrices of several genomes.
    """
    path, groups = file.filename, _groups(file)
    if len(groups) > 1:
        raise UserError(f"{path}: has matrices of several genomes ({', '.join(groups)}); write one genome per file")
    group = file[groups[0]]
    places, columns = (group["features"], _COLUMNS) if "features" in group else (group, _OLD_COLUMNS)
    var = pd.DataFrame({new: _text(places[old]) for old, new in columns.items() if old in places})
    if not len(var.columns):
        raise UserError(f"{path}: has no names of genes in {groups[0]}; expected a count matrix of Cell Ranger")
    barcodes, shape = _text(group["barcodes"]), [int(size) for size in group["shape"][:2]]
    if shape != [len(var), len(barcodes)]:
        raise UserError(f"{path}: is {shape}, features x barcodes {[len(var), len(barcodes)]}; the file is damaged")
    matrix = CountMatrix(file, groups[0], (shape[1], shape[0]))
    return StoredCells.of(pd.DataFrame(index=barcodes), {"X": matrix}, var.set_index(var.columns[0], drop=False))


def _text(values: h5py.Dataset) -> npt.NDArray[np.object_]:
    return np.array([item.decode() if isinstance(item, bytes) else str(item) for item in values[:]], dtype=object)


def read_ten_x_folder(folder: Path) -> StoredCells:
    """Cells of a folder of Cell Ranger; the counts are in memory, as a sparse matrix.

    Raises
    ------
    UserError
        A file is missing or damaged, or the files do not match.
    """
    path = _required(folder, "matrix.mtx")
    barcodes = _lines(_required(folder, "barcodes.tsv"))[0]
    features = _lines(_required(folder, "features.tsv", "genes.tsv"))
    try:
        values = scipy.io.mmread(path)
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise UserError(
            f"{path}: not a complete matrix in MatrixMarket format ({' '.join(str(error).split())})"
        ) from error
    expected = (len(features), len(barcodes))
    if values.shape == expected:
        values = values.T
    elif values.shape != expected[::-1]:
        raise UserError(f"{path}: is {values.shape}, features x barcodes {expected}: the files do not belong together")
    var = features.set_axis(["gene_ids", "gene_symbols", "feature_types"][: features.shape[1]], axis=1)
    obs = pd.DataFrame(index=barcodes.to_numpy(object))
    matrix = ArrayMatrix(sp.csr_matrix(values), str(path))
    return StoredCells.of(obs, {"X": matrix}, var.set_index("gene_ids", drop=False))


def _required(folder: Path, *names: str) -> Path:
    found = [path for name in names for path in find_named(folder, name)]
    if not found:
        raise UserError(f"{folder}: has no {' or '.join(names)} (or .gz); expected the files of one 10x sample")
    if len(found) > 1:
        listed = ", ".join(path.name for path in found[:3])
        raise UserError(
            f"{folder}: has several files {names[0]} ({listed}); put the files of each sample into a folder"
        )
    return found[0]


def _lines(path: Path) -> pd.DataFrame:
    """A headerless TSV, at most three columns, all as text."""
    try:
        table = pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)
    except (OSError, EOFError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path}: not a readable TSV ({' '.join(str(error).split())})") from error
    return table.iloc[:, :3]
