"""Embeddings in an Experiment's obsm: written beside what readers see, put in place in one step, read back in blocks.

A new embedding is an array of its own, which becomes visible when it is added to the collection. One that replaces
another must end up in the array that is there, since a collection's key cannot be set twice: its fragments are moved
into that array, where they count for nothing until a single file lists them as committed (TileDB's format for
consolidated commits). Whoever opened the array before goes on reading the old cells.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tiledbsoma

from census_scvi.census.open import MEASUREMENT
from census_scvi.errors import UserError
from census_scvi.workspace.atomic import remove, sync, write_json
from census_scvi.workspace.uri import local_path

INFO, PUBLICATION = "CxG_embedding_info", "census_scvi_publication"
_OBSM = "obsm"
_TILE_CELLS = 2048
_READ_CELLS = 16 * _TILE_CELLS
_MOVING = "moving.json"

Values = npt.NDArray[np.float32]
Joinids = npt.NDArray[np.int64]


def published_uri(experiment_uri: str, name: str) -> str | None:
    """URI of `obsm[name]`; None where there is none."""
    with _opened(experiment_uri) as experiment:
        measurement = experiment.ms[MEASUREMENT]
        if _OBSM not in measurement or name not in measurement[_OBSM]:
            return None
        return str(measurement[_OBSM][name].uri)


def check_target(
    experiment_uri: str, name: str, shape: tuple[int, int], publication: str, *, replace: bool
) -> Path | None:
    """The array that a publication would replace; None where the name is free, or holds that publication.

    Raises
    ------
    UserError
        The name is taken and `replace` is false, or it cannot be replaced: other dimensions, not on a local disk.
    """
    live = published_uri(experiment_uri, name)
    if live is None or publication_of(live) == publication:
        return None
    if not replace:
        raise UserError(
            f"{experiment_uri} has an obsm[{name!r}] already; set publish.replace to true to replace it, or"
            " publish.name to another name"
        )
    path = local_path(live)
    if path is None:
        raise UserError(f"{live} cannot be replaced, since it is not on a local disk; set publish.name to another")
    with tiledbsoma.open(live) as array:
        if array.shape != shape:
            raise UserError(
                f"obsm[{name!r}] is {array.shape[0]:,} x {array.shape[1]}, the new one {shape[0]:,} x {shape[1]}:"
                " only one of the same shape can be replaced; set publish.name to another name"
            )
    return path


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
    done
        Whether this publication is what readers see already.
    empty
        Whether the draft holds no cells yet, whatever was written to an earlier one.

    Raises
    ------
    UserError
        As `check_target` says.
    """

    def __init__(self, experiment_uri: str, name: str, shape: tuple[int, int], publication: str, *, replace: bool):
        self._experiment_uri, self._name, self._publication = experiment_uri, name, publication
        live = published_uri(experiment_uri, name)
        self.done = live is not None and publication_of(live) == publication
        self.empty = False
        if self.done:
            return
        self._live = check_target(experiment_uri, name, shape, publication, replace=replace)
        # Another name for each kind: the name may have been taken since an earlier run, and the draft then has a schema
        # of its own, whose fragments the array that is there could not read.
        kind = "" if self._live is None else "-next"
        self.uri = f"{_obsm_uri(experiment_uri)}/{name}-{publication[:12]}{kind}"
        self.empty = not (tiledbsoma.SparseNDArray.exists(self.uri) or self._moving)
        if self.empty:
            self._create(shape)

    def _create(self, shape: tuple[int, int]) -> None:
        if self._live is None:
            tiledbsoma.SparseNDArray.create(
                self.uri, type=pa.float32(), shape=shape, platform_config=_platform_config(shape[1])
            ).close()
            return
        # The same schema file: fragments name the schema they were written with.
        draft = self._draft()
        partial = draft.with_name(draft.name + ".partial")
        remove(partial)
        partial.mkdir()
        for folder in self._live.iterdir():
            if folder.name in ("__schema", "__meta"):
                shutil.copytree(folder, partial / folder.name)
            elif folder.is_dir():
                (partial / folder.name).mkdir()
        partial.rename(draft)

    def write(self, joinids: Joinids, values: Values) -> None:
        """Write cells; writing them again changes nothing.

        Parameters
        ----------
        joinids
            int64 (cells,), ascending: their soma_joinids.
        values
            float32 (cells, dimensions).
        """
        if self.done or self._moving:
            return
        rows = np.repeat(joinids, values.shape[1])
        columns = np.tile(np.arange(values.shape[1]), len(joinids))
        # In an array of our own making ascending cells lie in the order of its tiles: sorting takes six times as long.
        ordered = tiledbsoma.TileDBWriteOptions(sort_coords=self._live is not None)
        with tiledbsoma.SparseNDArray.open(self.uri, "w") as array:
            table = pa.table({"soma_dim_0": rows, "soma_dim_1": columns, "soma_data": values.ravel()})
            array.write(table, platform_config=ordered)

    def publish(self, info: dict[str, Any]) -> None:
        """Let readers see the embedding, with `info` in its metadata; may be repeated after a kill at any point."""
        if self.done:
            return
        if self._live is None:
            _write_info(self.uri, info, self._publication)
            with _opened_obsm(self._experiment_uri, "w") as obsm:
                obsm.set(self._name, tiledbsoma.SparseNDArray.open(self.uri), use_relative_uri=True)
        else:
            self._replace(self._live)
            _write_info(str(self._live), info, self._publication)
            remove(self._draft())
        self.done = True

    @property
    def _moving(self) -> bool:
        """Whether the draft was whole and its fragments are on their way."""
        return self._live is not None and (self._draft() / _MOVING).exists()

    def _draft(self) -> Path:
        path = local_path(self.uri)
        assert path is not None, "what is replaced is on a local disk, and the draft beside it"
        return path

    def _replace(self, live: Path) -> None:
        draft = self._draft()
        moving = draft / _MOVING
        if not moving.exists():
            names = sorted(path.stem for path in (draft / "__commits").glob("*.wrt"))
            write_json(moving, names)
        names = json.loads(moving.read_text(encoding="utf-8"))
        for name in names:
            if (fragment := draft / "__fragments" / name).exists():
                fragment.rename(live / "__fragments" / name)
        sync(live / "__fragments")
        times = [tuple(map(int, name.split("_")[2:4])) for name in names]
        version = names[0].rpartition("_")[2]
        first, last = min(start for start, _ in times), max(stop for _, stop in times)
        commit = live / "__commits" / f"__{first}_{last}_{self._publication}_{version}.con"
        listed = draft / commit.name
        listed.write_text("".join(f"__commits/{name}.wrt\n" for name in names), encoding="utf-8")
        sync(listed)
        listed.rename(commit)
        sync(commit.parent)


def stale_cells(uri: str, joinids: Joinids) -> Joinids:
    """soma_joinids that a published embedding holds and `joinids`, ascending, does not."""
    found = [np.empty(0, np.int64)]
    for some, _ in read_embedding(uri):
        places = np.minimum(np.searchsorted(joinids, some), len(joinids) - 1)
        found.append(some[joinids[places] != some])
    return np.concatenate(found)


def read_cells(uri: str, joinids: Joinids) -> Values:
    """Embedding of some cells, float32 (cells, dimensions), in ascending order; UserError where one has none."""
    with tiledbsoma.SparseNDArray.open(uri) as array:
        table = array.read(coords=(joinids.tolist(),)).tables().concat()
        found = list(_rows(uri, table, array.shape[1]))
    embedded = found[0][0] if found else np.empty(0, np.int64)
    if missing := sorted(set(joinids.tolist()) - set(embedded.tolist())):
        raise UserError(f"{uri} has no embedding of {len(missing):,} cells, the first with soma_joinid {missing[0]}")
    return found[0][1]


def read_embedding(uri: str) -> Iterator[tuple[Joinids, Values]]:
    """Embedded cells in blocks, by soma_joinid: int64 (cells,) and float32 (cells, dimensions).

    Raises
    ------
    UserError
        A cell has not a value in each dimension, or the array cannot be read.
    """
    try:
        with tiledbsoma.SparseNDArray.open(uri) as array:
            for start in range(0, array.shape[0], _READ_CELLS):
                table = array.read(coords=(slice(start, min(start + _READ_CELLS, array.shape[0]) - 1),)).tables()
                yield from _rows(uri, table.concat(), array.shape[1])
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
def _opened_obsm(experiment_uri: str, mode: str) -> Iterator[Any]:
    with tiledbsoma.Collection.open(_obsm_uri(experiment_uri), mode) as obsm:
        yield obsm


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


def _write_info(uri: str, info: dict[str, Any], publication: str) -> None:
    with tiledbsoma.SparseNDArray.open(uri, "w") as array:
        array.metadata[INFO] = json.dumps(info)
        array.metadata[PUBLICATION] = publication


def _platform_config(n_features: int) -> dict[str, Any]:
    zstd = {"_type": "ZstdFilter", "level": 5}
    create = {
        "allows_duplicates": False,  # a block that is written again after a kill is there once
        "dims": {
            "soma_dim_0": {"tile": _TILE_CELLS, "filters": ["DoubleDeltaFilter", zstd]},
            "soma_dim_1": {"tile": n_features, "filters": ["DoubleDeltaFilter", zstd]},
        },
        "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", zstd]}},
        "cell_order": "row-major",
        "tile_order": "row-major",
    }
    return {"tiledb": {"create": create}}
