"""Embeddings in an Experiment's obsm, read in blocks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tiledbsoma

from census_scvi.census.open import MEASUREMENT, Census
from census_scvi.census.storage import soma_context
from census_scvi.errors import UserError
from census_scvi.files.uri import without_credentials

OBSM, PUBLICATION = "obsm", "census_scvi_publication"
# Cells per tile of the array, and cells per block that is read.
TILE_CELLS = 2048
_READ_CELLS = 16 * TILE_CELLS

Values = npt.NDArray[np.float32]
Joinids = npt.NDArray[np.int64]


def published_uri(experiment_uri: str, name: str) -> str | None:
    """URI of `obsm[name]`; None if it does not exist."""
    with open_experiment(experiment_uri) as experiment:
        measurement = experiment.ms[MEASUREMENT]
        if OBSM not in measurement or name not in measurement[OBSM]:
            return None
        return str(measurement[OBSM][name].uri)


def read_cells(uri: str, joinids: Joinids) -> Values:
    """Embedding of cells, float32 (cells, dimensions), by soma_joinid; UserError if a cell has no embedding."""
    blocks = list(read_some(uri, np.sort(joinids)))
    embedded = np.concatenate([np.empty(0, np.int64), *(found for found, _ in blocks)])
    if missing := sorted(set(joinids.tolist()) - set(embedded.tolist())):
        raise UserError(f"{uri} has no embedding of {len(missing):,} cells, the first with soma_joinid {missing[0]}")
    return np.concatenate([values for _, values in blocks])


def read_some(uri: str, joinids: Joinids) -> Iterator[tuple[Joinids, Values]]:
    """Embedding of cells in blocks, by soma_joinid: int64 (cells,) and float32 (cells, dimensions)."""
    with _readable(uri) as array:
        for start in range(0, len(joinids), _READ_CELLS):
            wanted = joinids[start : start + _READ_CELLS]
            table = array.read(coords=(pa.array(wanted),)).tables().concat()
            yield from _rows(uri, table, array.shape[1])


def read_embedding(uri: str) -> Iterator[tuple[Joinids, Values]]:
    """Embedding of all cells in blocks, by soma_joinid: int64 (cells,) and float32 (cells, dimensions).

    Raises
    ------
    UserError
        A cell does not have one value in each dimension, or the array cannot be read.
    """
    with _readable(uri) as array:
        for start in range(0, array.shape[0], _READ_CELLS):
            table = array.read(coords=(slice(start, min(start + _READ_CELLS, array.shape[0]) - 1),)).tables()
            yield from _rows(uri, table.concat(), array.shape[1])


@contextmanager
def _readable(uri: str) -> Iterator[Any]:
    try:
        with tiledbsoma.SparseNDArray.open(uri, context=soma_context(uri)) as array:
            yield array
    except tiledbsoma.SOMAError as error:
        raise UserError(f"{uri} cannot be read: {str(error).splitlines()[0]}") from None


def _rows(uri: str, table: pa.Table, n_features: int) -> Iterator[tuple[Joinids, Values]]:
    if not len(table):
        return
    cells, features, values = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
    joinids, times = np.unique(cells, return_counts=True)
    if (times != n_features).any():
        cell = joinids[np.argmax(times != n_features)]
        raise UserError(
            f"{uri}: the cell with soma_joinid {cell} does not have one value in each of {n_features} dimensions"
        )
    yield joinids, values[np.lexsort((features, cells))].reshape(-1, n_features)


class EmbeddingHash:
    """SHA-256 of the cells and values of an embedding; it does not depend on the division into blocks."""

    def __init__(self) -> None:
        self._joinids, self._values = hashlib.sha256(), hashlib.sha256()

    def update(self, joinids: Joinids, values: Values) -> None:
        """Add cells, in ascending order of soma_joinid."""
        self._joinids.update(np.ascontiguousarray(joinids, "<i8").tobytes())
        self._values.update(np.ascontiguousarray(values, "<f4").tobytes())

    def hexdigest(self) -> str:
        """Hash of the cells added so far."""
        return hashlib.sha256(self._joinids.digest() + self._values.digest()).hexdigest()


@contextmanager
def open_experiment(experiment_uri: str) -> Iterator[Any]:
    """Open an Experiment for reading; UserError if there is none, or if it has no measurement RNA."""
    try:
        experiment = tiledbsoma.Experiment.open(experiment_uri, context=soma_context(experiment_uri))
    except (tiledbsoma.DoesNotExistError, tiledbsoma.SOMAError, TypeError) as error:
        raise UserError(f"{experiment_uri} is not a SOMA Experiment ({str(error).splitlines()[0]})") from None
    with experiment:
        _require_measurement(experiment_uri, experiment)
        yield experiment


def _require_measurement(experiment_uri: str, experiment: Any) -> None:
    try:
        if MEASUREMENT not in experiment.ms:
            raise UserError(f"{experiment_uri} has no measurement {MEASUREMENT}")
        _ = experiment.ms[MEASUREMENT]
    except (tiledbsoma.DoesNotExistError, tiledbsoma.SOMAError) as error:
        message = str(error).splitlines()[0]
        if cut := _CUT_RECORD.search(message):
            message = (
                f"its record {cut[1]} is truncated (a writer was killed, or the disk was full); delete that file,"
                " and everything that was written before can be read again"
            )
        raise UserError(f"{experiment_uri}: ms[{MEASUREMENT!r}] cannot be opened: {message}") from None


_CUT_RECORD = re.compile(r"exceeds file size: .* URI (\S+/__group/\S+)")


def is_array(uri: str) -> bool:
    """Whether a location has an array, such as an embedding that is not in obsm."""
    return bool(tiledbsoma.SparseNDArray.exists(uri, context=soma_context(uri)))


def require_same_release(text: str, uri: str, census: Census) -> None:
    """UserError if the `CxG_embedding_info` of an array is damaged, or names another release or organism."""
    try:
        info = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{without_credentials(uri)}: its CxG_embedding_info is damaged ({error})") from None
    expected = {census.identity["version"], census.identity["created_on"]} - {None}
    release, organism = info.get("census_version"), info.get("experiment_name")
    if (release and release not in expected) or (organism and organism != census.identity["organism"]):
        raise UserError(
            f"{without_credentials(uri)} is an embedding of {organism or 'cells'} of the Census {release}, and this is"
            f" {census.identity['organism']} of {' or '.join(sorted(expected))}: soma_joinids are valid in one release"
        )


def publication_of(uri: str) -> str | None:
    """The publication id of an embedding; None if it was not published by this project."""
    with tiledbsoma.open(uri, context=soma_context(uri)) as array:
        return array.metadata.get(PUBLICATION)
