"""Copy the index of a run to where readers of its published embedding find it: next to the embedding's array."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import tiledbsoma

from census_scvi.census.storage import soma_context, storage
from census_scvi.config.run_names import INDEX_RECORD
from census_scvi.errors import UserError
from census_scvi.files.atomic import remove, sync, sync_tree
from census_scvi.files.json_file import read_json
from census_scvi.files.uri import local_path, without_credentials
from census_scvi.publication.obsm import INFO
from census_scvi.query.nearest import index_place
from census_scvi.workspace import Artifacts, Workspace

log = logging.getLogger(__name__)


def publish_index(directory: Path, artifacts: Artifacts) -> None:
    """Copy the index of a run next to its published embedding, if there is one of the same embedding without it.

    The folder of the index then has the id of the publication in its record. The `indexes` in the array's
    `CxG_embedding_info` name it as the Census API expects it, relative to obsm.

    Raises
    ------
    UserError
        The target cannot be written; nothing of the embedding changes.
    """
    workspace = Workspace(directory)
    built, published = workspace.whole_record("index"), workspace.whole_record("publish")
    if built is None or published is None:
        return
    if built["fingerprint"]["inputs"][artifacts.latent] != published["fingerprint"]["inputs"][artifacts.latent]:
        log.warning("the index of %s is of another embedding than the published one, and is not published", directory)
        return
    uri = published.get("array")
    if uri is None or not tiledbsoma.SparseNDArray.exists(uri, context=soma_context(uri)):
        log.warning("the published embedding is not where %s wrote it, so its index is not published", directory)
        return
    folder = directory / artifacts.index
    record = {**read_json(folder / INDEX_RECORD), "publication": published["publication"]}
    try:
        copied = _copy(folder, index_place(uri), record)
        named = _name_in_info(uri, record)
    except (OSError, ValueError, tiledbsoma.SOMAError) as error:
        raise UserError(
            f"the index cannot be written to {without_credentials(index_place(uri))}: {error}; the embedding is"
            " published without it; run scvi-index.py again"
        ) from None
    if copied or named:
        log.info("published the index: %s", without_credentials(index_place(uri)))


def _copy(folder: Path, uri: str, record: dict[str, Any]) -> bool:
    """Copy the folder, its record last; returns False if it is there already."""
    system, target = storage(uri)
    place, content = f"{target}/{INDEX_RECORD}", json.dumps(record, indent=2).encode()
    if system.exists(place):
        with system.open(place, "rb") as file:
            if file.read() == content:
                return False
    if (path := local_path(uri)) is not None:
        partial = path.with_name(f"{path.name}.partial")
        remove(partial)
        shutil.copytree(folder, partial)
        (partial / INDEX_RECORD).write_bytes(content)
        sync_tree(partial)
        remove(path)
        partial.rename(path)
        sync(path.parent)
        return True
    if system.exists(target):
        system.rm(target, recursive=True)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / INDEX_RECORD)
    for file in files:
        system.put_file(str(file), f"{target}/{file.relative_to(folder).as_posix()}")
    with system.open(place, "wb") as out:
        out.write(content)
    return True


def _name_in_info(uri: str, record: dict[str, Any]) -> bool:
    """Name the indexes in the array's metadata; returns False if it names them already."""
    with tiledbsoma.open(uri, context=soma_context(uri)) as array:
        info = json.loads(array.metadata[INFO])
    folder = index_place(uri).rstrip("/").rpartition("/")[2]
    indexes = [{"type": "IVFFlat", "relative_uri": f"{folder}/{metric}"} for metric in record["indexes"]]
    if info.get("indexes") == indexes:
        return False
    with tiledbsoma.SparseNDArray.open(uri, "w", context=soma_context(uri)) as array:
        array.metadata[INFO] = json.dumps({**info, "indexes": indexes})
    return True
