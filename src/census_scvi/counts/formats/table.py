"""Dense tables of cells x genes as text: CSV and TSV, which may be gzipped."""

from __future__ import annotations

import csv
import gzip
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.counts.array_matrix import ArrayMatrix
from census_scvi.counts.formats.stored import StoredCells
from census_scvi.errors import UserError

log = logging.getLogger(__name__)

_SUFFIXES = (".csv", ".tsv", ".txt")
_SEPARATORS = (",", "\t", ";")
# Rows that are inspected to recognise columns of text, and values that are parsed at a time.
_HEAD, _WINDOW = 200, 2**22
# Genes that nearly every table of RNA counts has, and that nobody names a cell after.
_GENES = r"(?i)^(?:ENS[A-Z]*G\d{11}(?:\.\d+)?|RP[LS]\d+[AXYL]?|MT-[A-Z0-9]+|ACTB|GAPDH|B2M|MALAT1|TMSB4X|EEF1A1)$"
_FEWEST_GENES = 3
# Names of a first column with the names of the cells, which may be numbers.
_CELL_NAMES = {"", "cell", "cells", "cell_id", "cellid", "barcode", "barcodes", "index", "id", "obs_names"}
_EXPECTED = "expected one row per cell and one column per gene, the gene names in the first row"


def is_table(path: Path) -> bool:
    """Whether a file has the suffix of a table."""
    return path.name.removesuffix(".gz").lower().endswith(_SUFFIXES)


def read_table(path: Path) -> StoredCells:
    """Cells of a table; the values are in memory, as a sparse matrix.

    The first row has the names of the genes; a first column of text, without a name or with a name such as
    `cell_id` has the names of the cells.
    Other columns of text become obs. A table of genes x cells is recognised by its names and turned.

    Raises
    ------
    UserError
        The first row has numbers instead of names; rows differ in length; a value is missing or not a number.
    """
    header, first_rows = _head(path)
    separator = _separator(header)
    rows = [next(csv.reader([line], delimiter=separator)) for line in (header, *first_rows)]
    names = _column_names(path, rows)
    texts = _text_columns(names, rows[1:])
    parts, labels = [], []
    for frame in _frames(path, separator, names, texts):
        parts.append(_numbers(path, frame.drop(columns=texts)))
        labels.append(frame[texts])
    obs = pd.concat(labels)
    obs.index = _cell_names(obs, names, texts)
    obs = obs.drop(columns=[name for name in texts if name == names[0]])
    var = pd.DataFrame(index=[str(name) for name in names if name not in texts])
    matrix = sp.vstack(parts, format="csr")
    if _is_turned(obs.index, var.index):
        log.warning("%s has genes in the rows and cells in the columns: it is read as cells x genes", path)
        matrix, obs, var = sp.csr_matrix(matrix.T), var, obs
    return StoredCells.of(obs, {"X": ArrayMatrix(matrix, str(path))}, var)


def _head(path: Path) -> tuple[str, list[str]]:
    """The first line and some lines after it, without empty ones."""
    lines: list[str] = []
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig") as file
        ):
            for line in file:
                if line.strip():
                    lines.append(line.rstrip("\r\n"))
                if len(lines) > _HEAD:
                    break
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable table of text ({' '.join(str(error).split())})") from error
    if len(lines) < 2:
        raise UserError(f"{path}: has {len(lines)} rows; {_EXPECTED}")
    return lines[0], lines[1:]


def _separator(header: str) -> str:
    return max(_SEPARATORS, key=header.count)


def _column_names(path: Path, rows: list[list[str]]) -> list[str]:
    """Names of the columns; the first is "" if the header of the cell names is absent, as R writes it."""
    header, first = rows[0], rows[1]
    if len(header) == len(first) - 1:
        header = ["", *header]
    if len(header) < 2:
        raise UserError(f"{path}: has one column; {_EXPECTED}, separated by commas, tabs or semicolons")
    if all(map(_is_number, header[1:])):
        raise UserError(
            f"{path}: has no header: its first row has numbers ({', '.join(header[1:4])}, ...) instead of names"
            " of genes; write the names of the genes as the first row"
        )
    lengths = {len(row) for row in rows[1:]} - {len(header)}
    if lengths:
        raise UserError(f"{path}: the first row has {len(header):,} columns, other rows {min(lengths):,}; {_EXPECTED}")
    if twice := [name for name in dict.fromkeys(header) if header.count(name) > 1]:
        raise UserError(
            f"{path}: {len(twice):,} names of columns occur several times, such as {twice[0]!r}; rename them"
        )
    return header


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _text_columns(names: list[str], rows: list[list[str]]) -> list[str]:
    """Columns that do not hold numbers, and a first column of names of cells."""
    texts = [names[0]] if names[0].strip().lower() in _CELL_NAMES else []
    columns = zip(names, zip(*rows, strict=True), strict=True)
    return list(dict.fromkeys([*texts, *(name for name, values in columns if not any(map(_is_number, values)))]))


def _frames(path: Path, separator: str, names: list[str], texts: list[str]) -> Iterator[pd.DataFrame]:
    """The table in blocks of rows, columns of text as str."""
    try:
        yield from pd.read_csv(
            path,
            sep=separator,
            header=None,
            skiprows=1,
            names=names,
            index_col=False,
            dtype=dict.fromkeys(texts, str),
            na_values=[""],
            keep_default_na=True,
            chunksize=max(1, _WINDOW // len(names)),
            encoding="utf-8-sig",
            low_memory=False,
        )
    except (OSError, EOFError, UnicodeDecodeError, ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{path}: not a readable table ({' '.join(str(error).split())}); {_EXPECTED}") from error


def _numbers(path: Path, frame: pd.DataFrame) -> sp.csr_matrix:
    """Values of a block; UserError if one is missing or not a number."""
    for column in frame.columns[[dtype.kind not in "iuf" for dtype in frame.dtypes]]:
        wrong = frame[column][pd.to_numeric(frame[column], errors="coerce").isna()]
        where = f"column {column!r}, row {wrong.index[0] + 2:,}" if len(wrong) else f"column {column!r}"
        found = repr(wrong.iloc[0]) if len(wrong) else "values that are not numbers"
        raise UserError(f"{path}: {where} has {found}; expected a number (text is read from columns of text only)")
    values = frame.to_numpy(np.float64)
    missing = np.argwhere(np.isnan(values))
    if len(missing):
        row, column = missing[0]
        raise UserError(
            f"{path}: column {frame.columns[column]!r}, row {frame.index[row] + 2:,} is empty; expected a number, 0 for"
            " none"
        )
    return sp.csr_matrix(values)


def _cell_names(obs: pd.DataFrame, names: Sequence[str], texts: list[str]) -> npt.NDArray[Any]:
    if names[0] in texts:
        return obs[names[0]].astype(str).to_numpy(object)
    return np.arange(len(obs)).astype(str).astype(object)


def _is_turned(rows: pd.Index, columns: pd.Index) -> bool:
    """Whether the rows are genes: more of them have the name of a usual gene than of the columns."""
    in_rows, in_columns = (int(index.astype(str).str.match(_GENES).sum()) for index in (rows, columns))
    return in_rows >= _FEWEST_GENES and in_rows > in_columns
