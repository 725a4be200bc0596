"""Stage import-embedding: makes a run directory from the embedding of any model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiledbsoma

from census_scvi.census.cells import matching_joinids
from census_scvi.census.embedding import read_embedding, require_same_release
from census_scvi.census.open import MEASUREMENT, Census, open_census
from census_scvi.census.storage import soma_context
from census_scvi.census.stream import consecutive, stream_blocks, tile_runs
from census_scvi.config.run_names import PROGRESS
from census_scvi.config.stages import STAGES
from census_scvi.counts.row_hash import count_hashes
from census_scvi.errors import UserError
from census_scvi.files.atomic import write_json
from census_scvi.files.uri import tiledb_place, without_credentials
from census_scvi.model.settings import ImportEmbeddingSection
from census_scvi.settings import Config
from census_scvi.stages.inputs import inputs_of
from census_scvi.stages.plan import Plan
from census_scvi.stages.protocol import Task
from census_scvi.terminal.progress import progress_bar

log = logging.getLogger(__name__)

_BLOCK_CELLS = 2**16
# Estimates for --dry-run. Memory: of the imports and of a block of counts, and per cell. Seconds per cell: to read the
# counts of all genes.
_BASE_MEMORY, _BYTES_A_CELL, _CELL_SECONDS = 0.8e9, 40.0, 1e-4

Joinids = npt.NDArray[np.int64]


def run(task: Task) -> None:
    """Check the array and write latent.npy, soma_joinids and hashes of the counts, in the order of the Census."""
    config, artifacts, census = task.config, task.artifacts, task.census
    settings = _complete(config.import_embedding)
    task.start()
    vectors, joinids = _read(settings, census, task.run.path("vectors.raw"))
    order = _checked_order(joinids, census, config.census.obs_query, settings)
    n_cells, n_dimensions = vectors.shape
    latent = np.lib.format.open_memmap(
        task.run.path(artifacts.latent), "w+", dtype=np.float32, shape=(n_cells, n_dimensions)
    )
    for start in range(0, n_cells, _BLOCK_CELLS):
        rows = order[start : start + _BLOCK_CELLS]
        latent[start : start + len(rows)] = _finite(vectors[rows], joinids[rows], settings)
    latent.flush()
    write_json(task.run.path(PROGRESS), {"cells": n_cells})  # the array is sound: a killed run has only hashes to do
    ordered = joinids[order]
    np.save(task.run.path(artifacts.latent_joinids), ordered)
    hashes = _hashes(census, ordered, task.run.path("hashes.raw"))
    np.save(task.run.path(artifacts.latent_hashes), hashes)
    for name in ("vectors.raw", "hashes.raw"):
        task.run.path(name).unlink(missing_ok=True)
    imported = {"method": settings.method, "vectors": without_credentials(settings.vectors)}
    counts = {"cells": n_cells, "n_latent": n_dimensions}
    names = [artifacts.latent, artifacts.latent_joinids, artifacts.latent_hashes]
    task.commit(names, counts, census=census.identity, imported=imported)
    log.info("wrote %s: %s cells x %d", task.directory / artifacts.latent, f"{n_cells:,}", n_dimensions)


def _complete(settings: ImportEmbeddingSection) -> ImportEmbeddingSection:
    if settings.vectors is None:
        raise UserError("import_embedding.vectors is not set; give a .npy file of vectors, or the URI of a SOMA array")
    if settings.is_file and settings.joinids is None:
        raise UserError(
            f"import_embedding.joinids is not set; give the .npy file with the soma_joinid of each row of"
            f" {settings.vectors}"
        )
    return settings


def _read(settings: ImportEmbeddingSection, census: Census, copy: Path) -> tuple[Any, Joinids]:
    """The vectors, memory-mapped, and the soma_joinid of each; UserError if they are not what they should be."""
    if not settings.is_file:
        return _read_array(str(settings.vectors), census, copy)
    vectors = _load(str(settings.vectors), "import_embedding.vectors")
    joinids = _load(str(settings.joinids), "import_embedding.joinids")
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise UserError(
            f"{settings.vectors} has shape {vectors.shape} and dtype {vectors.dtype}; expected floats of shape (cells,"
            " dimensions)"
        )
    if joinids.ndim != 1 or joinids.dtype.kind not in "iu":
        raise UserError(
            f"{settings.joinids} has shape {joinids.shape} and dtype {joinids.dtype}; expected one whole number, the"
            " soma_joinid, per cell"
        )
    if len(vectors) != len(joinids):
        raise UserError(
            f"{settings.vectors} has {len(vectors):,} cells, and {settings.joinids} has {len(joinids):,} soma_joinids"
        )
    _require_dimensions(str(settings.vectors), vectors.shape[1])
    if vectors.dtype != np.float32:
        log.info("%s is %s, and is converted to float32", settings.vectors, vectors.dtype)
    return vectors, np.asarray(joinids).astype(np.int64)


def _load(path: str, setting: str) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{setting} {path} does not exist") from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{setting} {path} is not a .npy file of numbers, or is damaged ({error})") from None


def _read_array(place: str, census: Census, copy: Path) -> tuple[Any, Joinids]:
    """Copy a SOMA array to a file, because cells are read from it in any order."""
    uri = tiledb_place(place, "import_embedding.vectors")
    try:
        with tiledbsoma.SparseNDArray.open(uri, context=soma_context(uri)) as array:
            n_rows, n_dimensions = array.shape[0], int(array.shape[1])
            info = str(array.metadata.get("CxG_embedding_info", "{}"))
    except (tiledbsoma.DoesNotExistError, tiledbsoma.SOMAError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{without_credentials(uri)} is not a SOMA array of an embedding ({reason})") from None
    _require_dimensions(without_credentials(uri), n_dimensions)
    require_same_release(info, uri, census)
    found = []
    with copy.open("wb") as file, progress_bar(n_rows, "read") as bar:
        for joinids, values in read_embedding(uri):
            found.append(joinids)
            file.write(np.ascontiguousarray(values, np.float32).tobytes())
            bar.update(len(joinids))
    cells = np.concatenate([np.empty(0, np.int64), *found])
    if not len(cells):
        raise UserError(f"{without_credentials(uri)} has no cell")
    return np.memmap(copy, np.float32, "r", shape=(len(cells), n_dimensions)), cells


def _require_dimensions(what: str, n_dimensions: int) -> None:
    if n_dimensions < 2:
        raise UserError(f"{what} has {n_dimensions} dimension; an embedding has two or more")


def _checked_order(
    joinids: Joinids, census: Census, obs_query: str | None, settings: ImportEmbeddingSection
) -> npt.NDArray[np.int64]:
    """Positions of the cells in the order of the Census; UserError if one is there twice, or not of the Census."""
    order = np.argsort(joinids, kind="stable")
    ordered = joinids[order]
    source = settings.joinids or settings.vectors
    if (twice := np.flatnonzero(ordered[1:] == ordered[:-1])).size:
        raise UserError(f"{source} has soma_joinid {ordered[twice[0]]} more than once")
    wanted = matching_joinids(census, obs_query, "census.obs_query")
    others = np.setdiff1d(ordered, wanted, assume_unique=True)
    if len(others):
        query = "" if obs_query is None else " that match census.obs_query"
        raise UserError(
            f"{len(others):,} of {len(ordered):,} cells of {source} are not among the {len(wanted):,} cells of"
            f" {census.identity['uri']}{query}; the first has soma_joinid {others[0]}. soma_joinids are valid in one"
            " release of the Census: set census.version to that of the embedding"
        )
    if len(ordered) < len(wanted):
        log.warning("%s of %s cells have no vector", f"{len(wanted) - len(ordered):,}", f"{len(wanted):,}")
    return order


def _finite(block: Any, joinids: Joinids, settings: ImportEmbeddingSection) -> npt.NDArray[np.float32]:
    """The vectors as float32; UserError if one has NaN, infinity or a value that float32 cannot represent."""
    with np.errstate(over="ignore"):
        values = np.asarray(block).astype(np.float32)
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        row = int(bad.argmax())
        value = np.asarray(block[row])[~np.isfinite(values[row])][0]
        raise UserError(
            f"{settings.vectors}: the cell with soma_joinid {joinids[row]} has the value {value}; an embedding has"
            " finite numbers"
        )
    return values


def _hashes(census: Census, joinids: Joinids, path: Path) -> npt.NDArray[np.uint64]:
    """Hash of the counts of all genes of each cell; a killed run goes on where it ended."""
    n_genes = census.experiment.ms[MEASUREMENT].var.count
    every = np.arange(n_genes, dtype=np.int64)
    blocks = [block for block in tile_runs(joinids, 4096) for block in consecutive(*block, 4096)]
    with path.open("ab") as file, progress_bar(len(joinids), "hash counts") as bar:
        file.truncate(8 * (done := file.tell() // 8))
        left = [block for block in blocks if block[1] > done]
        for block in stream_blocks(census, joinids, every, blocks=left):
            skipped = max(done - block.start, 0)
            file.write(count_hashes(block.counts, None)[skipped:].tobytes())
            file.flush()
            bar.update(block.counts.shape[0])
    return np.fromfile(path, np.uint64)


def plan(config: Config) -> Plan:
    """Plan of the stage, from the size of the array."""
    settings = _complete(config.import_embedding)
    inputs_of(STAGES["import-embedding"], config)
    if settings.is_file:
        n_cells, n_dimensions = _load(str(settings.vectors), "import_embedding.vectors").shape
    else:
        with open_census(config.census):  # checks the settings of TileDB
            uri = tiledb_place(str(settings.vectors), "import_embedding.vectors")
            with tiledbsoma.SparseNDArray.open(uri, context=soma_context(uri)) as array:
                n_dimensions = int(array.shape[1])
                n_cells = array.nnz // n_dimensions
    artifacts = config.artifacts
    return Plan(
        "import-embedding",
        reads=[str(name) for name in (settings.vectors, settings.joinids) if name],
        writes=[
            str(config.directory / name)
            for name in (artifacts.latent, artifacts.latent_joinids, artifacts.latent_hashes)
        ],
        cells=n_cells,
        genes=0,
        memory=_BASE_MEMORY + _BYTES_A_CELL * n_cells,
        disk=n_cells * (4.0 * n_dimensions + 16),
        seconds=3.0 + _CELL_SECONDS * n_cells,
    )
