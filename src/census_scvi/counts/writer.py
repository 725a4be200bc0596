"""Write a standard .h5ad in blocks of cells; it needs the memory of a block and 8 bytes per cell."""

from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anndata as ad
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from anndata.io import write_elem

from census_scvi.counts.vector import Compression, VectorWriter

# Values per chunk. The loader reads blocks of 256 cells, which have 100,000 or more non-zeros: with much larger chunks,
# it would decode many values that it does not use.
_CHUNK = 2**14
_THREADS = min(8, os.cpu_count() or 1)
_HELD_BYTES = 4 * 2**20
_STRING = h5py.string_dtype("utf-8")


class H5adWriter:
    """Appends blocks of cells to an .h5ad file in the format of anndata.

    Parameters
    ----------
    path
        File to write; an existing file is replaced.
    var
        Frame of the genes, indexed by feature_id.
    uns
        Unstructured annotation.
    compression
        Compression of the counts.

    Examples
    --------
    >>> with H5adWriter(path, var) as writer:
    ...     for block in blocks:
    ...         writer.append(block.obs, counts=block.counts)
    """

    def __init__(
        self, path: Path, var: pd.DataFrame, uns: dict[str, Any] | None = None, *, compression: Compression = "gzip"
    ) -> None:
        self._path = path
        self._require_room(0)
        self._file = h5py.File(path, "w")
        self._compression = compression
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="compress")
        self._file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        self._n_genes = len(var)
        write_elem(self._file, "var", _as_anndata_writes(var))
        write_elem(self._file, "uns", uns or {})
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            write_elem(self._file, name, {})
        self._row_ends: list[npt.NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self._categories: dict[str, pd.Index] = {}
        self._numbers: dict[str, VectorWriter] = {}
        self._n_cells = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._pool.shutdown()
            self._file.close()

    def append(
        self,
        obs: pd.DataFrame,
        *,
        counts: sp.csr_matrix | None = None,
        obsm: dict[str, npt.NDArray[np.float32]] | None = None,
    ) -> None:
        """Append cells.

        Parameters
        ----------
        obs
            One row per cell, indexed by name; the same columns, dtypes and categories in every call.
        counts
            CSR float32 (cells, genes), indices sorted; None: the cells have no counts in this file.
        obsm
            Arrays (cells, dimensions), with the same names in every call.
        """
        if counts is None:
            counts = sp.csr_matrix((len(obs), self._n_genes)).astype(np.float32)
        self._require_room(8 * counts.nnz + int(obs.memory_usage(deep=True).sum()) + _bytes_of(obsm))
        if not self._n_cells:
            self._begin(obs)
        self._numbers["X/data"].append(counts.data)
        self._numbers["X/indices"].append(counts.indices)
        self._row_ends.append(counts.indptr[1:].astype(np.int64) + self._row_ends[-1][-1])
        self._extend("obs/_index", obs.index.to_numpy(dtype=object))
        for name in obs.columns:
            column = obs[name]
            categorical = isinstance(column.dtype, pd.CategoricalDtype)
            if categorical and not column.cat.categories.equals(self._categories[name]):
                raise ValueError(f"the categories of obs column {name!r} differ from those of the first block")
            self._extend(f"obs/{name}" + "/codes" * categorical, column.cat.codes if categorical else column)
        for name, values in (obsm or {}).items():
            if f"obsm/{name}" not in self._numbers:
                self._begin_numbers(f"obsm/{name}", values.dtype, width=values.shape[1])
            self._extend(f"obsm/{name}", values)
        self._n_cells += len(obs)

    def _require_room(self, n_bytes: int) -> None:
        """OSError if the disk has no space for these bytes and for data of earlier cells that HDF5 still buffers.

        The check is necessary because HDF5 cannot close a file on a full disk, and crashes.
        """
        wanted = 2 * n_bytes + _HELD_BYTES
        if shutil.disk_usage(self._path.parent).free < wanted:
            words = f"{os.strerror(errno.ENOSPC)}, {wanted / 1e6:,.1f} MB are needed"
            raise OSError(errno.ENOSPC, words, str(self._path))

    def _begin(self, obs: pd.DataFrame) -> None:
        frame = self._file.create_group("obs")
        frame.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
        frame.attrs["column-order"] = np.array(list(obs.columns), dtype=object)
        self._begin_text("obs/_index")
        for name in obs.columns:
            self._begin_column(f"obs/{name}", obs[name])
        group = self._file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        self._begin_numbers("X/data", np.float32, compression=self._compression)
        self._begin_numbers("X/indices", np.int32, compression=self._compression, random_low_byte=True)

    def _begin_column(self, key: str, column: pd.Series) -> None:
        if isinstance(column.dtype, pd.CategoricalDtype):
            group = self._file.create_group(key)
            group.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0"})
            group.attrs["ordered"] = bool(column.cat.ordered)
            self._categories[str(column.name)] = column.cat.categories
            write_elem(group, "categories", column.cat.categories.to_numpy(dtype=object))
            self._begin_numbers(f"{key}/codes", column.cat.codes.dtype)
        elif column.dtype.kind in "OTU" or isinstance(column.dtype, pd.StringDtype):
            self._begin_text(key)
        else:
            self._begin_numbers(key, column.dtype)

    def _begin_text(self, key: str) -> None:
        dataset = self._file.create_dataset(key, shape=(0,), maxshape=(None,), chunks=(_CHUNK,), dtype=_STRING)
        dataset.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})

    def _begin_numbers(self, key: str, dtype: Any, *, compression: Compression = "gzip", **options: Any) -> None:
        group, _, name = key.rpartition("/")
        self._numbers[key] = VectorWriter(
            self._file[group], name, dtype, chunk=_CHUNK, compression=compression, pool=self._pool, **options
        )

    def _extend(self, key: str, values: Any) -> None:
        values = np.asarray(values)
        if key in self._numbers:
            self._numbers[key].append(values)
            return
        dataset = self._file[key]
        start = dataset.shape[0]
        dataset.resize(start + len(values), axis=0)
        dataset[start:] = values

    def _finish(self) -> None:
        if not self._n_cells:
            raise ValueError("no cell was appended")
        self._require_room(16 * self._n_cells)
        for numbers in self._numbers.values():
            numbers.finish()
        row_ends = np.concatenate(self._row_ends)
        if row_ends[-1] <= np.iinfo(np.int32).max:  # the dtype that scipy would choose
            row_ends = row_ends.astype(np.int32)
        write_elem(self._file["X"], "indptr", row_ends)
        self._file["X"].attrs["shape"] = np.array([self._n_cells, self._n_genes], dtype=np.int64)


def _bytes_of(obsm: dict[str, npt.NDArray[np.float32]] | None) -> int:
    return sum(values.nbytes for values in (obsm or {}).values())


def _as_anndata_writes(frame: pd.DataFrame) -> pd.DataFrame:
    """Convert repeated text to categoricals, as `AnnData.write_h5ad` does."""
    holder = ad.AnnData(var=frame)
    holder.strings_to_categoricals()
    return holder.var
