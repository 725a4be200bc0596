"""An embedding as an array of its own, in the form in which CELLxGENE carries community embeddings."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import tiledbsoma

from census_scvi.census.embedding import PUBLICATION, TILE_CELLS, Joinids, Values
from census_scvi.census.precision import rounded
from census_scvi.census.storage import soma_context, storage
from census_scvi.config.types import Precision
from census_scvi.errors import UserError
from census_scvi.files.atomic import sync_tree
from census_scvi.files.uri import local_path, tiledb_place, without_credentials
from census_scvi.publication.obsm import INFO, write_cells

SEAL = "census_scvi_seal"
# What CELLxGENE's contribution tool accepts.
_MOST_TITLE, _MOST_DESCRIPTION = 96, 2048


class ArrayDraft:
    """An array that is being written; it is complete when it has `CxG_embedding_info`.

    Parameters
    ----------
    place
        Folder or URL of the array.
    shape
        Number of possible soma_joinids, and of dimensions.
    publication
        Id of the publication; the same id continues the same draft.
    precision
        Of the values.
    replace
        Whether an array of another publication may be replaced.

    Attributes
    ----------
    uri
        The array.
    done
        Whether it is complete.
    empty
        Whether it holds no cells yet.

    Raises
    ------
    UserError
        The place has another publication and `replace` is false, or anything else.
    """

    def __init__(
        self, place: str, shape: tuple[int, int], publication: str, precision: Precision, *, replace: bool
    ) -> None:
        self.uri = tiledb_place(place, "publish.array_uri")
        self._publication, self._precision = publication, precision
        found = _metadata(self.uri)
        self.empty = found.get(PUBLICATION) != publication
        self.done = not self.empty and INFO in found
        if self.empty:
            check_place(place, publication, replace=replace)
            system, path = storage(self.uri)
            if system.exists(path):
                system.rm(path, recursive=True)
            with tiledbsoma.SparseNDArray.create(
                self.uri,
                type=pa.float32(),
                shape=shape,
                platform_config=_platform_config(shape[1]),
                context=soma_context(self.uri),
            ) as array:
                array.metadata[PUBLICATION] = publication

    def write(self, joinids: Joinids, values: Values) -> None:
        """Write cells, ascending, as `EmbeddingDraft.write`; the values are rounded."""
        write_cells(self.uri, joinids, rounded(values, self._precision))

    def publish(self, info: dict[str, Any], seal: str) -> None:
        """Complete the array: `info`, and the seal of the provenance, in its metadata."""
        if self.done:
            return
        if (path := local_path(self.uri)) is not None:
            sync_tree(path)
        with tiledbsoma.SparseNDArray.open(self.uri, "w", context=soma_context(self.uri)) as array:
            array.metadata[SEAL] = seal
            array.metadata[INFO] = json.dumps(info)
        self.done = True


def is_of(place: str, publication: str) -> bool:
    """Whether a place has the complete array of a publication."""
    found = _metadata(tiledb_place(place, "publish.array_uri"))
    return found.get(PUBLICATION) == publication and INFO in found


def check_place(place: str, publication: str, *, replace: bool) -> None:
    """UserError if a place has another publication and `replace` is false, or anything else."""
    uri = tiledb_place(place, "publish.array_uri")
    system, path = storage(uri)
    found = _metadata(uri)
    if not system.exists(path) or found.get(PUBLICATION) == publication:
        return
    shown = without_credentials(uri)
    if PUBLICATION not in found and not _is_begun(uri, found, system.ls(path, detail=False)):
        raise UserError(f"publish.array_uri {shown} has something else than an array of ours; give a new place")
    if INFO in found and not replace:
        raise UserError(f"publish.array_uri {shown} has another publication; set publish.replace to true to replace it")


def seal_in(uri: str) -> str | None:
    """Seal of the provenance of an array; None if it has none."""
    found = _metadata(uri).get(SEAL)
    return None if found is None else str(found)


def contribution_problems(info: dict[str, Any]) -> list[str]:
    """What CELLxGENE's contribution tool would refuse in the metadata, as far as it can be checked offline."""
    contact = info["primary_contact"]
    checks = {
        f"publish.title has {len(info['title'])} characters, expected 1 to {_MOST_TITLE}": not (
            1 <= len(info["title"]) <= _MOST_TITLE
        ),
        f"publish.description has {len(info['description'])} characters, expected 1 to {_MOST_DESCRIPTION}": not (
            1 <= len(info["description"]) <= _MOST_DESCRIPTION
        ),
        "publish.contact needs name, email and affiliation": not all(
            contact[name] for name in ("name", "email", "affiliation")
        ),
        "publish.doi is a DOI such as 10.1101/2024.01.01, without https://": "://" in info["DOI"],
    }
    return [words for words, wrong in checks.items() if wrong]


def _metadata(uri: str) -> dict[str, Any]:
    """Metadata of an array; empty if there is none."""
    context = soma_context(uri)
    if not tiledbsoma.SparseNDArray.exists(uri, context=context):
        return {}
    with tiledbsoma.SparseNDArray.open(uri, context=context) as array:
        return dict(array.metadata)


def _is_begun(uri: str, found: dict[str, Any], entries: list[str]) -> bool:
    """Whether a place has only what a publisher that was killed at once leaves: nothing, or an array without cells."""
    if not found:
        return all(entry.rstrip("/").rpartition("/")[2].startswith("__") for entry in entries)
    with tiledbsoma.SparseNDArray.open(uri, context=soma_context(uri)) as array:
        return INFO not in found and array.nnz == 0


def _platform_config(n_features: int) -> dict[str, Any]:
    """Tiles and filters of CELLxGENE's arrays; but a cell that is written again after a kill is stored once."""
    create = {
        "capacity": 2**17,
        "allows_duplicates": False,
        "dims": {
            "soma_dim_0": {
                "tile": TILE_CELLS,
                "filters": [{"_type": "PositiveDeltaFilter", "window": 2048}, {"_type": "ZstdFilter", "level": 9}],
            },
            "soma_dim_1": {"tile": n_features, "filters": ["DeltaFilter", {"_type": "ZstdFilter", "level": 9}]},
        },
        "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", {"_type": "ZstdFilter", "level": 19}]}},
        "cell_order": "row-major",
        "tile_order": "row-major",
    }
    return {"tiledb": {"create": create}}
