"""Embeddings in an Experiment's obsm: written where no reader sees them, put in place in one step, read in blocks.

An embedding is an array of its own, which readers see when the collection names it (`group.name_member`). Whoever
opened the collection before, or the array that was replaced, continues to read that one.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tiledbsoma

from census_scvi.census.build.schema import CHECKSUM
from census_scvi.census.group import make_member, name_member, withdraw
from census_scvi.census.open import MEASUREMENT
from census_scvi.census.storage import soma_context, storage
from census_scvi.errors import UserError
from census_scvi.workspace.atomic import sync_tree
from census_scvi.workspace.uri import local_path

INFO, PUBLICATION = "CxG_embedding_info", "census_scvi_publication"
_OBSM = "obsm"
_TILE_CELLS = 2048
_READ_CELLS = 16 * _TILE_CELLS
# Seconds after which a publisher to a bucket, where there are no locks, looks whether another took the name.
_SETTLES = 10.0

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
        32 hexadecimal digits; with the same ones the same draft is continued.
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
        self.empty = not tiledbsoma.SparseNDArray.exists(self.uri, context=soma_context(self.uri))
        if self.empty:
            _clear(self.uri)
            tiledbsoma.SparseNDArray.create(
                self.uri,
                type=pa.float32(),
                shape=shape,
                platform_config=_platform_config(shape[1]),
                context=soma_context(self.uri),
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
        with tiledbsoma.SparseNDArray.open(self.uri, "w", context=soma_context(self.uri)) as array:
            table = pa.table({"soma_dim_0": rows, "soma_dim_1": columns, "soma_data": values.ravel()})
            array.write(table, platform_config=ordered)

    def publish(self, info: dict[str, Any]) -> None:
        """Let readers see the embedding, with `info` in its metadata; may be repeated after a kill at any point."""
        if self.done:
            return
        with tiledbsoma.SparseNDArray.open(self.uri, "w", context=soma_context(self.uri)) as array:
            array.metadata[INFO] = json.dumps(info)
            array.metadata[PUBLICATION] = self._publication
        if (path := local_path(self.uri)) is not None:
            sync_tree(path)
        self._put_in_place()
        self.done = True

    def _put_in_place(self) -> None:
        """Let the name mean this array; UserError where another publisher takes it at the same time.

        On a disk a lock keeps others away. A bucket has none: a publisher looks whether the name is free, takes it,
        and looks again after a while that is longer than another one needs from its first look to its taking.
        """
        shared, looked = local_path(self.uri) is None, time.monotonic()
        if (live := published_uri(self._experiment_uri, self._name)) != self.replaces:
            raise self._taken_meanwhile(live)
        record = name_member(self._obsm_uri, self._name, self._member, tiledbsoma.SparseNDArray)
        took = time.monotonic() - looked
        if shared and took > _SETTLES:
            withdraw(self._obsm_uri, record)
            raise UserError(
                f"{self._experiment_uri} took {took:.0f} seconds to name this publication: in more than {_SETTLES:.0f}"
                " another publisher may take the name, too; nothing was published, run the same command again"
            )
        if shared:
            time.sleep(_SETTLES)
        live = published_uri(self._experiment_uri, self._name)
        if live is None or publication_of(live) != self._publication:
            withdraw(self._obsm_uri, record)
            raise self._taken_meanwhile(published_uri(self._experiment_uri, self._name))

    def _taken_meanwhile(self, live: str | None) -> UserError:
        return UserError(
            f"obsm[{self._name!r}] of {self._experiment_uri} was"
            f" {'removed' if live is None else f'published by another ({live})'} while this publication was written;"
            " run the same command again to publish after it"
        )


def _clear(uri: str) -> None:
    """Take away what was left of an array where its maker was killed."""
    system, path = storage(uri)
    if system.exists(path):
        system.rm(path, recursive=True)


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
    made = make_member(uri, _OBSM, tiledbsoma.Collection, tiledbsoma.Collection.create)
    name_member(uri, _OBSM, _OBSM, tiledbsoma.Collection)
    return made


@contextmanager
def _opened(experiment_uri: str) -> Iterator[Any]:
    try:
        experiment = tiledbsoma.Experiment.open(experiment_uri, context=soma_context(experiment_uri))
    except (tiledbsoma.DoesNotExistError, tiledbsoma.SOMAError, TypeError) as error:
        raise UserError(f"{experiment_uri} is no SOMA Experiment ({str(error).splitlines()[0]})") from None
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
                f"its record {cut[1]} is cut off, as when a writer was killed or found the disk full; delete that file,"
                " and everything that was written before can be read again"
            )
        raise UserError(f"{experiment_uri}: ms[{MEASUREMENT!r}] cannot be opened: {message}") from None


_CUT_RECORD = re.compile(r"exceeds file size: .* URI (\S+/__group/\S+)")


def publication_of(uri: str) -> str | None:
    """The publication that an embedding names; None where this project has not published it."""
    with tiledbsoma.open(uri, context=soma_context(uri)) as array:
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
