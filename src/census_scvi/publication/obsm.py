"""Writing an embedding to an Experiment's obsm: hidden from readers at first, then published in one step.

An embedding is a separate array. Readers see it once the collection points to it (`group.name_member`). Readers that
opened the collection or the replaced array earlier continue to read the old array.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pyarrow as pa
import tiledbsoma

from census_scvi.census.embedding import (
    OBSM,
    PUBLICATION,
    TILE_CELLS,
    Joinids,
    Values,
    open_experiment,
    publication_of,
    published_uri,
)
from census_scvi.census.open import MEASUREMENT
from census_scvi.census.schema import CHECKSUM
from census_scvi.census.storage import soma_context, storage
from census_scvi.errors import UserError
from census_scvi.files.atomic import sync_tree
from census_scvi.files.uri import local_path
from census_scvi.publication.group import make_member, name_member, withdraw

INFO = "CxG_embedding_info"
# Seconds after which a publisher to a bucket (no locks) checks again that no other publisher took the name.
_SETTLES = 10.0


def check_target(experiment_uri: str, name: str, publication: str, *, replace: bool) -> None:
    """UserError if another publication has the name and `replace` is false."""
    live = published_uri(experiment_uri, name)
    if live is not None and publication_of(live) != publication and not replace:
        raise UserError(
            f"{experiment_uri} has an obsm[{name!r}] already; set publish.replace to true to replace it, or"
            " publish.name to another name"
        )


class EmbeddingDraft:
    """An embedding that is being written to an Experiment; readers do not see it before `publish`.

    Parameters
    ----------
    experiment_uri
        The Experiment.
    name
        Its name in obsm.
    shape
        Number of cells of the Experiment, and of dimensions.
    publication
        Id of the publication, 32 hexadecimal digits; the same id continues the same draft.
    replace
        Whether an embedding of that name may be replaced.

    Attributes
    ----------
    uri
        The array.
    replaces
        URI of the array that readers saw before; it is not deleted.
    done
        Whether readers already see this publication.
    empty
        Whether the draft holds no cells yet.

    Raises
    ------
    UserError
        See `check_target`.
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
        """Write cells; writing the same cells again changes nothing.

        Parameters
        ----------
        joinids
            int64 (cells,), ascending: their soma_joinids.
        values
            float32 (cells, dimensions).
        """
        write_cells(self.uri, joinids, values)

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
        """Point the name to this array; UserError if another publisher takes it at the same time.

        On a disk a lock excludes other publishers. A bucket has no locks: a publisher checks that the name is free,
        takes it, waits for longer than another publisher needs between these two steps, and checks again.
        """
        shared, looked = local_path(self.uri) is None, time.monotonic()
        if (live := published_uri(self._experiment_uri, self._name)) != self.replaces:
            raise self._taken_meanwhile(live)
        record = name_member(self._obsm_uri, self._name, self._member, tiledbsoma.SparseNDArray)
        took = time.monotonic() - looked
        if shared and took > _SETTLES:
            withdraw(self._obsm_uri, record)
            raise UserError(
                f"{self._experiment_uri} took {took:.0f} seconds to write the name of this publication: in more"
                f" than {_SETTLES:.0f}"
                " another publisher may use the name, too; nothing was published, run the same command again"
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
            f" {'removed' if live is None else f'replaced by another ({live})'} while this publication was written;"
            " run the same command again to publish after it"
        )


def write_cells(uri: str, joinids: Joinids, values: Values) -> None:
    """Write cells to an array: int64 (cells,), ascending, and float32 (cells, dimensions)."""
    rows = np.repeat(joinids, values.shape[1])
    columns = np.tile(np.arange(values.shape[1]), len(joinids))
    # Ascending cells are already in the order of the array's tiles; with sorting, writing takes six times as long.
    ordered = tiledbsoma.TileDBWriteOptions(sort_coords=False)
    with tiledbsoma.SparseNDArray.open(uri, "w", context=soma_context(uri)) as array:
        table = pa.table({"soma_dim_0": rows, "soma_dim_1": columns, "soma_data": values.ravel()})
        array.write(table, platform_config=ordered)


def _clear(uri: str) -> None:
    """Remove the partial array of a killed writer."""
    system, path = storage(uri)
    if system.exists(path):
        system.rm(path, recursive=True)


def _obsm_uri(experiment_uri: str) -> str:
    """URI of ms["RNA"].obsm; creates the collection if it is missing."""
    with open_experiment(experiment_uri) as experiment:
        measurement = experiment.ms[MEASUREMENT]
        if OBSM in measurement:
            return str(measurement[OBSM].uri)
        uri = measurement.uri
    made = make_member(uri, OBSM, tiledbsoma.Collection, tiledbsoma.Collection.create)
    name_member(uri, OBSM, OBSM, tiledbsoma.Collection)
    return made


def _platform_config(n_features: int) -> dict[str, Any]:
    zstd = {"_type": "ZstdFilter", "level": 5}
    create = {
        "allows_duplicates": False,  # a block that is written again after a kill is stored once
        "dims": {
            "soma_dim_0": {"tile": TILE_CELLS, "filters": ["DoubleDeltaFilter", zstd, CHECKSUM]},
            "soma_dim_1": {"tile": n_features, "filters": ["DoubleDeltaFilter", zstd, CHECKSUM]},
        },
        "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", zstd, CHECKSUM]}},
        "cell_order": "row-major",
        "tile_order": "row-major",
    }
    return {"tiledb": {"create": create}}
