"""Read the tables of any .h5ad, and its counts in blocks of rows from any layout; check that values are counts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.config.messages import suggestion
from census_scvi.counts.other_formats import check_path, explain_hdf5, explain_path
from census_scvi.counts.untrusted import check_file
from census_scvi.errors import UserError

# float32 represents integers exactly up to this value.
MAX_COUNT = 2**24
# Maximum number of non-zeros in memory (12 bytes each) while a CSC matrix, stored by gene, is converted to rows.
_CSC_WINDOW = 2**25
# A matrix may store an entry several times (the values are summed). A row (or column) with more than this number of
# values per entry on average is damaged.
_MOST_DUPLICATES = 8
# Maximum number of values of a dense matrix in memory at a time.
_DENSE_WINDOW = 2**24


def require_place(place: str, places: Sequence[str], name: str) -> None:
    """UserError if a file or an AnnData has no matrix `place`; the error lists the existing ones."""
    if place not in places:
        raise UserError(
            f"{name} has no {place}{suggestion(place, list(places))} (it has {', '.join(places) or 'no matrix'})"
        )


def open_file(path: Path) -> h5py.File:
    """Open an .h5ad for reading.

    Raises
    ------
    UserError
        The file is of another format (the error says how to convert it), or cannot be opened (`open_hdf5`).
    """
    file = open_hdf5(path)
    try:
        require_h5ad(file)
    except BaseException:
        file.close()
        raise
    return file


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file for reading.

    Raises
    ------
    UserError
        The file is missing, incomplete or not HDF5 (the error says how to convert it), or it refers to other files or
        declares absurd sizes (`census_scvi.counts.untrusted`).
    """
    check_path(path)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        explained = explain_path(path) or f"not a complete .h5ad file ({error})"
        raise UserError(f"{path}: {explained}") from error
    try:
        check_file(file)
    except BaseException:
        file.close()
        raise
    return file


def require_h5ad(file: h5py.File) -> None:
    """UserError unless an HDF5 file is an .h5ad; the error says how to convert it."""
    if "mod" in file or not {"obs", "var"} <= set(file):
        raise UserError(f"{file.filename}: {explain_hdf5(file) or f'has no obs and var; {_EXPECTED}'}")


def name_of(file: Any) -> str:
    """Path of an open HDF5 file or zarr store, for messages."""
    return str(file.filename) if isinstance(file, h5py.File) else str(file.store_path)


_EXPECTED = "expected an .h5ad as anndata writes it"


def unreadable(name: str, error: Exception) -> UserError:
    """The error to raise if HDF5 cannot read a matrix."""
    text = str(error).replace("\n", " ")
    if "filter" in text or "plugin" in text:
        return UserError(
            f"{name}: values are compressed with a filter that is not installed here ({text}); write the file"
            " again where"
            " it can be read: anndata.read_h5ad(old).write_h5ad(new, compression='gzip')"
        )
    return UserError(f"{name}: the file is damaged or truncated ({text})")


def read_frame(file: Any, key: str) -> pd.DataFrame:
    """The table at `key` (obs, var or raw/var) of an .h5ad or a zarr store; UserError if anndata cannot read it."""
    path = name_of(file)
    if key not in file:
        raise UserError(f"{path}: has no {key}; {_EXPECTED}")
    try:
        frame = _read_old_frame(file, key) if isinstance(file[key], h5py.Dataset) else anndata.io.read_elem(file[key])
    except Exception as error:  # anndata raises many kinds of errors
        if isinstance(error, OSError):
            raise unreadable(f"{path}: {key}", error) from error
        raise UserError(f"{path}: {key} cannot be read ({error})".replace("\n", " ")) from error
    if not isinstance(frame, pd.DataFrame):
        raise UserError(f"{path}: {key} is not a table; {_EXPECTED}")
    return frame


def _read_old_frame(file: h5py.File, key: str) -> pd.DataFrame:
    """Read a table of anndata before 0.7: a compound dataset with the index first, and categories in uns."""
    table = file[key][:]
    columns = {}
    for name in table.dtype.names:
        values = _old_text(table[name])
        categories = f"uns/{name}_categories"
        if categories in file:
            values = pd.Categorical.from_codes(values, _old_text(file[categories][:]))
        columns[name] = values
    return pd.DataFrame(columns).set_index(table.dtype.names[0])


def _old_text(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Decode bytes to text; numbers stay unchanged."""
    if values.dtype.kind not in "SO":
        return values
    return np.array([item.decode() if isinstance(item, bytes) else item for item in values], dtype=object)


def portable_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Convert text to a form that every anndata reads: str objects, or categories if values are missing.

    anndata before 0.11 does not support the nullable strings of pandas 3; later versions write them only on request.
    """
    changed = frame.copy(deep=False)
    changed.index = pd.Index(frame.index.astype(object).map(str), name=frame.index.name)
    for name in frame.columns:
        changed[name] = _portable(frame[name]).set_axis(changed.index)
    return changed


def _portable(values: pd.Series) -> pd.Series:
    dtype = values.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        names = dtype.categories
        return values.cat.rename_categories(names.astype(object)) if pd.api.types.is_string_dtype(names) else values
    if isinstance(dtype, pd.ArrowDtype) and not pd.api.types.is_string_dtype(dtype):
        return values.convert_dtypes(dtype_backend="numpy_nullable")
    if not pd.api.types.is_string_dtype(dtype):
        return values
    text = values.astype(object)
    return text.astype("category") if values.isna().any() else text


class CountMatrix:
    """The matrix at `key` of an open .h5ad or zarr store (CSR, CSC or dense), cells x genes, read in blocks of rows.

    Parameters
    ----------
    file, key
        Open h5py.File or zarr.Group, and the place of the matrix in it.
    csr_shape
        Shape of a CSR matrix whose group does not state it as anndata does; None: the group states it.
    """

    def __init__(self, file: Any, key: str, csr_shape: tuple[int, int] | None = None) -> None:
        self._node: Any = file[key]
        self._name = f"{name_of(file)}: {key}"
        shape: Any
        if csr_shape is not None:
            self._encoding, shape = "csr", csr_shape
        elif not hasattr(self._node, "keys"):
            # anndata before 0.7 wrote the matrix of one gene as a vector.
            self._encoding, shape = "array", self._node.shape
            shape = (*shape, 1) if len(shape) == 1 else shape
        else:
            # anndata before 0.7 wrote h5sparse_format and h5sparse_shape.
            attributes = self._node.attrs
            encoding = attributes.get("encoding-type", attributes.get("h5sparse_format", "?"))
            self._encoding = encoding.decode() if isinstance(encoding, bytes) else str(encoding)
            shape = np.atleast_1d(attributes.get("shape", attributes.get("h5sparse_shape", ())))
        self._encoding = self._encoding.removesuffix("_matrix")
        if self._encoding not in ("array", "csr", "csc") or len(shape) != 2 or not _whole(shape):
            raise UserError(
                f"{self._name} is stored as {self._encoding!r} of shape ({', '.join(map(str, shape))}); expected cells"
                " x genes as a CSR, CSC or dense matrix"
            )
        self.shape = (int(shape[0]), int(shape[1]))
        if self._encoding != "array":
            self._check_sparse()

    def _check_sparse(self) -> None:
        """UserError if the lengths of data, indices and indptr do not match."""
        try:
            lengths = {name: int(self._node[name].shape[0]) for name in ("data", "indices", "indptr")}
        except (KeyError, IndexError, AttributeError) as error:
            raise UserError(f"{self._name}: data, indices or indptr is missing; the file is damaged") from error
        lines = self.shape[0] if self._encoding == "csr" else self.shape[1]
        if lengths["data"] != lengths["indices"] or lengths["indptr"] != lines + 1:
            found = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
            raise UserError(
                f"{self._name} is a {self._encoding.upper()} matrix of {self.shape} whose parts do not match"
                f" ({found} long): the file is damaged"
            )

    def blocks(self, rows: int, *, first: int = 0, last: int | None = None) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, CSR) of at most `rows` rows at a time, from row `first` up to and excluding `last`.

        Values have a native dtype that scipy supports: float16 becomes float32, bool and short integers become int32.
        """
        stop = self.shape[0] if last is None else last
        if self._encoding == "csc":
            yield from self._csc_blocks(rows, first, stop)
            return
        if self._encoding == "array":
            rows = min(rows, max(1, _DENSE_WINDOW // max(self.shape[1], 1)))
        for start in range(first, stop, rows):
            yield start, self._read(start, min(start + rows, stop))

    def sample(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, sp.csr_matrix]]:
        """(first row, CSR) of ascending ranges of rows; a matrix stored by gene is read once for all ranges."""
        if self._encoding != "csc":
            return [(start, self._read(start, stop)) for start, stop in spans]
        position = np.full(self.shape[0], -1, np.int64)
        wanted = np.concatenate([np.arange(*span) for span in spans])
        position[wanted] = np.arange(len(wanted))
        rows = self._csc_rows(position, len(wanted))
        ends = np.cumsum([stop - start for start, stop in spans])
        return [(start, rows[end - (stop - start) : end]) for (start, stop), end in zip(spans, ends, strict=True)]

    def _read(self, start: int, stop: int) -> sp.csr_matrix:
        if self._encoding == "array":
            values = plain_numbers(self._node[start:stop], self._name)
            return sp.csr_matrix(values.reshape(stop - start, self.shape[1]))
        indptr = self._node["indptr"][start : stop + 1].astype(np.int64)
        self._check_indptr(indptr, self.shape[1])
        span = slice(int(indptr[0]), int(indptr[-1]))
        indices = self._node["indices"][span]
        self._check_indices(indices, self.shape[1])
        arrays = (plain_numbers(self._node["data"][span], self._name), indices, indptr - indptr[0])
        return sp.csr_matrix(arrays, shape=(stop - start, self.shape[1]))

    def _csc_blocks(self, rows: int, first: int, last: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Rows of a matrix stored by gene: each pass over the file collects a window of rows that fits in memory."""
        per_row = np.zeros(self.shape[0], dtype=np.int64)
        for _, indices in self._csc_chunks():
            per_row += np.bincount(indices, minlength=self.shape[0])
        until = np.concatenate([[0], np.cumsum(per_row)])
        position = np.full(self.shape[0], -1, np.int64)
        start = first
        while start < last:
            fits = int(np.searchsorted(until, until[start] + _CSC_WINDOW, side="right")) - 1
            stop = min(max(fits, start + 1), last)
            position[:] = -1
            position[start:stop] = np.arange(stop - start)
            window = self._csc_rows(position, stop - start)
            for row in range(start, stop, rows):
                yield row, window[row - start : min(row + rows, stop) - start]
            start = stop

    def _csc_rows(self, position: npt.NDArray[Any], n_rows: int) -> sp.csr_matrix:
        """The rows whose `position` in the result is not -1."""
        indptr = self._node["indptr"][:].astype(np.int64)
        self._check_indptr(indptr, self.shape[0])
        rows, genes, values = [], [], []
        for first, indices in self._csc_chunks():
            of_result = position[indices]
            inside = np.flatnonzero(of_result >= 0)
            rows.append(of_result[inside])
            genes.append((np.searchsorted(indptr, first + inside, side="right") - 1).astype(np.int32))
            values.append(plain_numbers(self._node["data"][first : first + len(indices)], self._name)[inside])
        entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(genes)))
        return sp.csr_matrix(entries, shape=(n_rows, self.shape[1]))

    def _csc_chunks(self) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Yield the entries in stored order, in chunks: position of the first entry, row indices."""
        values, step = self._node["indices"], 2**22
        for first in range(0, max(values.shape[0], 1), step):
            indices = values[first : first + step]
            self._check_indices(indices, self.shape[0])
            yield first, indices

    def _check_indptr(self, indptr: npt.NDArray[Any], width: int) -> None:
        """Prevent a forged indptr from causing reads of foreign memory or an exhaustion of memory."""
        n_entries = np.diff(indptr)
        if (
            int(indptr[0]) < 0
            or int(indptr[-1]) > self._node["data"].shape[0]
            or (n_entries < 0).any()
            or int(n_entries.max(initial=0)) > _MOST_DUPLICATES * width
        ):
            raise UserError(f"{self._name}: indptr does not fit data and shape {self.shape}; the file is damaged")

    def _check_indices(self, indices: npt.NDArray[Any], width: int) -> None:
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= width):
            raise UserError(f"{self._name}: indices do not fit the shape {self.shape}; the file is damaged")


def _whole(shape: Sequence[Any]) -> bool:
    return all(isinstance(size, int | np.integer) and size >= 0 for size in shape)


def plain_numbers(values: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """Values in a native dtype that scipy.sparse supports; UserError if they are not real numbers."""
    dtype = values.dtype
    if dtype.kind not in "buif":
        raise UserError(f"{where} holds {dtype} values; expected raw counts")
    if dtype.kind in "bui" and dtype.itemsize < 4:  # duplicate entries are summed, which must not overflow
        return values.astype(np.int32)
    if dtype.kind == "f" and dtype.itemsize < 4:  # half precision in any byte order
        return values.astype(np.float32)
    if dtype.itemsize > 8:  # long double
        return values.astype(np.float64)
    return values.astype(dtype.newbyteorder("="), copy=False)


def check_counts(block: sp.csr_matrix, *, where: str, first_row: int) -> None:
    """Refuse a block (cells x genes) with values other than whole numbers from 0 to 2**24.

    Raises UserError with `where` (file and matrix), the row, the column and the value.
    """
    values = block.data
    if values.dtype.kind in "ui":
        bad = (values < 0) | (values > MAX_COUNT)
    elif values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            bad = ~((values >= 0) & (values <= MAX_COUNT) & (values == np.trunc(values)))
    else:
        raise UserError(f"{where} holds {values.dtype} values; expected raw counts")
    if not bad.any():
        return
    entry = int(np.flatnonzero(bad)[0])
    row = first_row + int(np.searchsorted(block.indptr, entry, side="right")) - 1
    value = values[entry]
    if value > MAX_COUNT and np.isfinite(value):
        what = f"larger than {MAX_COUNT:,}, which float32 cannot represent exactly"
    else:
        what = "not a raw count (a whole number, 0 or more)"
    raise UserError(
        f"{where} holds {value:g} in row {row}, column {int(block.indices[entry])}: {what}; "
        "if the counts are elsewhere in the file, set counts: X, raw or layers/<name>"
    )
