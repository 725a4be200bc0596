"""Where the index of an embedding is, and whether it is that of the embedding."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from census_scvi.census.embedding import publication_of
from census_scvi.census.storage import soma_context, storage
from census_scvi.config.extras import require_extra
from census_scvi.config.run_names import INDEX, INDEX_RECORD, LATENT
from census_scvi.errors import UserError
from census_scvi.files.json_file import read_json
from census_scvi.files.uri import without_credentials
from census_scvi.neighbors.cell_index import CellIndex
from census_scvi.neighbors.settings import Metric
from census_scvi.workspace import Workspace

log = logging.getLogger(__name__)


def index_place(array_uri: str) -> str:
    """Folder of the indexes of a published embedding, next to its array."""
    return f"{array_uri.rstrip('/')}-index"


def index_of_run(directory: Path, metric: Metric = "euclidean") -> CellIndex | None:
    """Index of the embedding in a run directory; None without one, or if it is of an earlier embedding."""
    workspace = Workspace(directory)
    built, embedded = workspace.record("index"), workspace.record("create-latent-update")
    if built is None or embedded is None:
        return None
    if built["fingerprint"]["inputs"][LATENT] != embedded["outputs"][LATENT]:
        log.warning("the index of %s is of an earlier embedding; scvi-index.py --force builds it again", directory)
        return None
    return _opened(str(directory / INDEX), read_json(directory / INDEX / INDEX_RECORD), metric)


def index_of_array(uri: str, metric: Metric = "euclidean") -> CellIndex | None:
    """Index next to a published embedding; None without one, or if it is of another publication."""
    system, folder = storage(index_place(uri))
    if not system.exists(f"{folder}/{INDEX_RECORD}"):
        return None
    with system.open(f"{folder}/{INDEX_RECORD}", "rb") as file:
        record = json.loads(file.read())
    if record.get("publication") != publication_of(uri):
        log.warning("the index %s is of another publication, and is not used", without_credentials(index_place(uri)))
        return None
    return _opened(index_place(uri), record, metric)


def _opened(place: str, record: dict[str, Any], metric: Metric) -> CellIndex | None:
    found = record["indexes"].get(metric)
    if found is None:
        return None
    try:
        require_extra("index", f"the index of all cells in {without_credentials(place)}")
    except UserError as error:
        log.warning("%s. Without it, a sample of the cells is searched", error)
        return None
    settings = {key: str(value) for key, value in soma_context(place).native_context.config().items()}
    size = (record["n_cells"], record["n_dimensions"], found["partitions"])
    return CellIndex(f"{place}/{metric}", metric, *size, found["nprobe"], tiledb=settings)
