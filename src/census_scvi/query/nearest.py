"""Where the index of an embedding is, and whether it is that of the embedding."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from census_scvi.census.embedding import publication_of
from census_scvi.census.storage import soma_context, storage
from census_scvi.config.extras import require_extra
from census_scvi.config.run_names import INDEX, INDEX_RECORD, LATENT
from census_scvi.errors import UserError
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
    return _opened(str(directory / INDEX), (directory / INDEX / INDEX_RECORD).read_bytes(), metric)


def index_of_array(uri: str, metric: Metric = "euclidean") -> CellIndex | None:
    """Index next to a published embedding; None without one, or if it is of another publication."""
    system, folder = storage(index_place(uri))
    if not system.exists(f"{folder}/{INDEX_RECORD}"):
        return None
    with system.open(f"{folder}/{INDEX_RECORD}", "rb") as file:
        return _opened(index_place(uri), file.read(), metric, publication_of(uri))


def _opened(place: str, record: bytes, metric: Metric, publication: str | None = None) -> CellIndex | None:
    """The index that a record describes; None if it is of another publication or metric, or cannot be used."""
    shown = without_credentials(place)
    try:
        described = json.loads(record)
        if publication is not None and described.get("publication") != publication:
            log.warning("the index %s is of another publication, and is not used", shown)
            return None
        if (found := described["indexes"].get(metric)) is None:
            return None
        n_cells, n_dimensions, n_partitions, nprobe = map(
            int, (described["n_cells"], described["n_dimensions"], found["partitions"], found["nprobe"])
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s/%s is damaged (%s); the index is not used, build it again", shown, INDEX_RECORD, error)
        return None
    try:
        require_extra("index", f"the index of all cells in {shown}")
    except UserError as error:
        log.warning("%s. Without it, a sample of the cells is searched", error)
        return None
    settings = {key: str(value) for key, value in soma_context(place).native_context.config().items()}
    return CellIndex(f"{place}/{metric}", metric, n_cells, n_dimensions, n_partitions, nprobe, settings)
