"""Embeddings in an Experiment's obsm: written beside what readers see, put in place in one step, read back in blocks.

An embedding is an array of its own, which readers see when the collection names it. tiledbsoma adds a name but replaces
none, and to take one away first would leave readers without. But a TileDB group is a folder of records, each adding
members, of which a later one wins: the one record that names the new array is made in a group aside, by TileDB itself,
and put among the others, a rename on a disk and one object in a bucket. Whoever opened the collection before, or the
array that was replaced, goes on reading that.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tiledbsoma

from census_scvi.census.build.schema import CHECKSUM
from census_scvi.census.open import MEASUREMENT
from census_scvi.errors import UserError
from census_scvi.workspace.atomic import sync
from census_scvi.workspace.uri import file_system, local_path

INFO, PUBLICATION = "CxG_embedding_info", "census_scvi_publication"
_OBSM = "obsm"
_TILE_CELLS = 2048
_READ_CELLS = 16 * _TILE_CELLS
# Where a TileDB group keeps its records: __<first ms>_<last ms>_<32 hexadecimal digits>_<version of the format>.
_RECORDS = "__group"
# How far a clock may be ahead of ours, in seconds.
_MOST_AHEAD = 10.0

Values = npt.NDArray[np.float32]
Joinids = npt.NDArray[np.int64]


def published_uri(experiment_uri: str, name: str) -> str | None:
    """URI of `obsm[name]`; None where there is none."""
    with _opened(experiment_uri) as experiment:
        measurement = experiment.ms[MEASUREMENT]
        if _OBSM not in measurement or name not in measurement[_OBSM]:
            return None
        return str(measurement[_OBSM][name].uri)


def check_target(experiment_uri: str, name: str, publication: str, *, replace: bool) -> None:
    """UserError where the name is taken by another publication and `replace` is false."""
    live = published_uri(experiment_uri, name)
    if live is not None and publication_of(live) != publication and not replace:
        raise UserError(
            f"{experiment_uri} has an obsm[{name!r}] already; set publish.replace to true to replace it, or"
            " publish.name to another name"
        )


class EmbeddingDraft:
    """An embedding on its way into an Experiment; nobody sees it before `publish`.

    Parameters
    ----------
    experiment_uri
        The Experiment.
    name
        Its name in obsm.
    shape
        Cells of the Experiment and dimensions.
    publication
        32 hexadecimal digits; the same ones go on with the same draft.
    replace
        Whether an embedding of that name may be replaced.

    Attributes
    ----------
    uri
        The array.
    replaces
        URI of the array that readers see before; it stays where it is.
    done
        Whether this publication is what readers see already.
    empty
        Whether the draft holds no cells yet.

    Raises
    ------
    UserError
        As `check_target` says.
    """

    def __init__(self, experiment_uri: str, name: str, shape: tuple[int, int], publication: str, *, replace: bool):
        check_target(experiment_uri, name, publication, replace=replace)
        self._experiment_uri, self._name, self._publication = experiment_uri, name, publication
        self._member = f"{name}-{publication[:12]}"
        self._obsm_uri = _obsm_uri(experiment_uri)
        self.uri = f"{self._obsm_uri}/{self._member}"
        self.replaces = published_uri(experiment_uri, name)
        self.done = self.replaces is not None and publication_of(self.replaces) == publication
        self.empty = not tiledbsoma.SparseNDArray.exists(self.uri)
        if self.empty:
            _clear(self.uri)
            tiledbsoma.SparseNDArray.create(
                self.uri, type=pa.float32(), shape=shape, platform_config=_platform_config(shape[1])
            ).close()

    def write(self, joinids: Joinids, values: Values) -> None:
        """Write cells; writing them again changes nothing.

        Parameters
        ----------
        joinids
            int64 (cells,), ascending: their soma_joinids.
        values
            float32 (cells, dimensions).
        """
        rows = np.repeat(joinids, values.shape[1])
        columns = np.tile(np.arange(values.shape[1]), len(joinids))
        # Ascending cells lie in the order of the array's tiles: sorting takes six times as long.
        ordered = tiledbsoma.TileDBWriteOptions(sort_coords=False)
        with tiledbsoma.SparseNDArray.open(self.uri, "w") as array:
            table = pa.table({"soma_dim_0": rows, "soma_dim_1": columns, "soma_data": values.ravel()})
            array.write(table, platform_config=ordered)

    def publish(self, info: dict[str, Any]) -> None:
        """Let readers see the embedding, with `info` in its metadata; may be repeated after a kill at any point."""
        if self.done:
            return
        with tiledbsoma.SparseNDArray.open(self.uri, "w") as array:
            array.metadata[INFO] = json.dumps(info)
            array.metadata[PUBLICATION] = self._publication
        if self.replaces is None:
            with tiledbsoma.Collection.open(self._obsm_uri, "w") as obsm:
                obsm.set(self._name, tiledbsoma.SparseNDArray.open(self.uri), use_relative_uri=True)
        else:
            _name_anew(self._obsm_uri, self._name, self._member)
        self.done = True


def _clear(uri: str) -> None:
    """Take away what was left of an array where its maker was killed."""
    system, path = file_system(uri)
    if system.exists(path):
        system.rm(path, recursive=True)


def _name_anew(group_uri: str, name: str, member: str) -> None:
    """Let `name`, which a group has already, mean another member of its folder."""
    system, group = file_system(group_uri)
    earlier = [Path(path).name for path in system.ls(f"{group}/{_RECORDS}", detail=False, refresh=True)]
    last = max(int(record.split("_")[3]) for record in earlier)
    now = time.time_ns() // 10**6
    if last > now + 1000 * _MOST_AHEAD:
        raise UserError(
            f"{group_uri} was last written {(last - now) / 1000:.0f} seconds from now: the clock of this machine or of"
            " its writer is wrong; nothing was published"
        )
    when = max(now, last + 1)
    version, data = _record(name, member)
    record = f"__{when}_{when}_{uuid.uuid4().hex}_{version}"
    if (path := local_path(group_uri)) is None:
        system.pipe_file(f"{group}/{_RECORDS}/{record}", data)
    else:
        aside = path / f"{member}.{record}"
        aside.write_bytes(data)
        sync(aside)
        aside.rename(path / _RECORDS / record)
        sync(path / _RECORDS)
    time.sleep(max(when / 1000 - time.time(), 0))  # until then readers do not see it


def _record(name: str, member: str) -> tuple[str, bytes]:
    """What TileDB writes into a group for an array in its folder: version of the format, and the record."""
    with tempfile.TemporaryDirectory() as scratch:
        with tiledbsoma.Collection.create(f"{scratch}/group") as group:
            group.add_new_sparse_ndarray(name, uri=member, type=pa.float32(), shape=(1, 1))
        (record,) = (Path(scratch) / "group" / _RECORDS).iterdir()
        return record.name.rpartition("_")[2], record.read_bytes()


def read_cells(uri: str, joinids: Joinids) -> Values:
    """Embedding of some cells, float32 (cells, dimensions), in ascending order; UserError where one has none."""
    blocks = list(read_some(uri, np.sort(joinids)))
    embedded = np.concatenate([np.empty(0, np.int64), *(found for found, _ in blocks)])
    if missing := sorted(set(joinids.tolist()) - set(embedded.tolist())):
        raise UserError(f"{uri} has no embedding of {len(missing):,} cells, the first with soma_joinid {missing[0]}")
    return np.concatenate([values for _, values in blocks])


def read_some(uri: str, joinids: Joinids) -> Iterator[tuple[Joinids, Values]]:
    """Embedding of some cells, ascending, in blocks: those of them that have one, and float32 (cells, dimensions)."""
    with _readable(uri) as array:
        for start in range(0, len(joinids), _READ_CELLS):
            wanted = joinids[start : start + _READ_CELLS]
            table = array.read(coords=(pa.array(wanted),)).tables().concat()
            yield from _rows(uri, table, array.shape[1])


def read_embedding(uri: str) -> Iterator[tuple[Joinids, Values]]:
    """Embedded cells in blocks, by soma_joinid: int64 (cells,) and float32 (cells, dimensions).

    Raises
    ------
    UserError
        A cell has not a value in each dimension, or the array cannot be read.
    """
    with _readable(uri) as array:
        for start in range(0, array.shape[0], _READ_CELLS):
            table = array.read(coords=(slice(start, min(start + _READ_CELLS, array.shape[0]) - 1),)).tables()
            yield from _rows(uri, table.concat(), array.shape[1])


@contextmanager
def _readable(uri: str) -> Iterator[Any]:
    try:
        with tiledbsoma.SparseNDArray.open(uri) as array:
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
        raise UserError(f"{uri}: the cell with soma_joinid {cell} has not one value in each of {n_features} dimensions")
    yield joinids, values[np.lexsort((features, cells))].reshape(-1, n_features)


class EmbeddingHash:
    """SHA-256 of an embedding's cells and values, whatever blocks they come in."""

    def __init__(self) -> None:
        self._joinids, self._values = hashlib.sha256(), hashlib.sha256()

    def update(self, joinids: Joinids, values: Values) -> None:
        """Add cells, in ascending order of soma_joinid."""
        self._joinids.update(np.ascontiguousarray(joinids, "<i8").tobytes())
        self._values.update(np.ascontiguousarray(values, "<f4").tobytes())

    def hexdigest(self) -> str:
        """The hash so far."""
        return hashlib.sha256(self._joinids.digest() + self._values.digest()).hexdigest()


def _obsm_uri(experiment_uri: str) -> str:
    """URI of ms["RNA"].obsm, which is made where it is missing."""
    with _opened(experiment_uri) as experiment:
        measurement = experiment.ms[MEASUREMENT]
        if _OBSM in measurement:
            return str(measurement[_OBSM].uri)
        uri = measurement.uri
    with tiledbsoma.Measurement.open(uri, "w") as measurement:
        return str(measurement.add_new_collection(_OBSM).uri)


@contextmanager
def _opened(experiment_uri: str) -> Iterator[Any]:
    try:
        experiment = tiledbsoma.Experiment.open(experiment_uri)
    except (tiledbsoma.DoesNotExistError, tiledbsoma.SOMAError, TypeError) as error:
        raise UserError(f"{experiment_uri} is no SOMA Experiment ({str(error).splitlines()[0]})") from None
    with experiment:
        if MEASUREMENT not in experiment.ms:
            raise UserError(f"{experiment_uri} has no measurement {MEASUREMENT}")
        yield experiment


def publication_of(uri: str) -> str | None:
    """The publication that an embedding names; None where this project has not published it."""
    with tiledbsoma.open(uri) as array:
        return array.metadata.get(PUBLICATION)


def _platform_config(n_features: int) -> dict[str, Any]:
    zstd = {"_type": "ZstdFilter", "level": 5}
    create = {
        "allows_duplicates": False,  # a block that is written again after a kill is there once
        "dims": {
            "soma_dim_0": {"tile": _TILE_CELLS, "filters": ["DoubleDeltaFilter", zstd, CHECKSUM]},
            "soma_dim_1": {"tile": n_features, "filters": ["DoubleDeltaFilter", zstd, CHECKSUM]},
        },
        "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", zstd, CHECKSUM]}},
        "cell_order": "row-major",
        "tile_order": "row-major",
    }
    return {"tiledb": {"create": create}}
