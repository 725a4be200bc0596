"""The embedding of an atlas' own cells, from an Experiment or from the run directory that computed it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import scvi
import tiledbsoma

from census_scvi.census.embedding import is_array, published_uri, read_some, require_same_release
from census_scvi.census.genes import locate_genes
from census_scvi.census.open import Census
from census_scvi.census.proteins import read_named_proteins
from census_scvi.census.settings import CensusSection
from census_scvi.census.slices import Embedding, Joinids, Values
from census_scvi.census.storage import soma_context
from census_scvi.census.stream import stream_blocks
from census_scvi.errors import UserError
from census_scvi.files.place import resolved
from census_scvi.files.uri import local_path, tiledb_place, without_credentials
from census_scvi.model.encode import Encoder
from census_scvi.model.published import fetch, read_provenance, warn_if_running_again
from census_scvi.model.safe import ModelDescription
from census_scvi.model.source import Kind, Source
from census_scvi.neighbors.cell_index import CellIndex
from census_scvi.query.mapping import MIN_SHARE
from census_scvi.query.nearest import index_of_array, index_of_run
from census_scvi.workspace import Artifacts, Workspace

log = logging.getLogger(__name__)

_STAGE, _FILES = "create-latent-update", (Artifacts.latent, Artifacts.latent_joinids)
_READ_CELLS = 2**15
# Number of cells that are embedded again to check an embedding, and the largest difference allowed.
_PROVEN_CELLS, _TOLERANCE = 64, 1e-3
_SAME_CENSUS = ("schema", "created_on", "organism", "cells")


class _NotThereError(UserError):
    """The embedding does not exist, or is of another Census."""


class PublishedEmbedding:
    """An embedding that is a SOMA array: in obsm of an Experiment, or on its own."""

    def __init__(self, uri: str) -> None:
        self.name, self._uri = uri, uri
        with tiledbsoma.SparseNDArray.open(uri, context=soma_context(uri)) as array:
            self.n_latent = int(array.shape[1])

    @classmethod
    def in_obsm(cls, experiment_uri: str, name: str = "scvi") -> Self:
        """`ms["RNA"].obsm[name]` of an Experiment; UserError if there is none."""
        uri = published_uri(experiment_uri, name)
        if uri is None:
            raise _NotThereError(
                f"{experiment_uri} has no obsm[{name!r}]; give another embedding, or a run directory that has one"
            )
        return cls(uri)

    @classmethod
    def own_array(cls, uri: str, census: Census) -> Self:
        """An array of its own; UserError if it is not complete, or of another Census or organism."""
        with tiledbsoma.SparseNDArray.open(uri, context=soma_context(uri)) as array:
            info = array.metadata.get("CxG_embedding_info")
        if info is None:
            raise UserError(f"{without_credentials(uri)} has no CxG_embedding_info, and is not a complete embedding")
        require_same_release(info, uri, census)
        return cls(uri)

    def index(self) -> CellIndex | None:
        """Index of all its cells; None without one."""
        return index_of_array(self._uri)

    def read(self, joinids: Joinids) -> Iterator[tuple[Joinids, Values]]:
        """As `Embedding` says."""
        return read_some(self._uri, joinids)


class RunEmbedding:
    """An embedding that is `latent.npy` of a run directory, checked against the manifest."""

    def __init__(self, directory: Path, census: Census) -> None:
        workspace = Workspace(directory)
        record = workspace.whole_record(_STAGE)
        if record is None:
            raise _NotThereError(f"{directory} has no embedding; run scvi-create-latent-update.py first")
        _require_same(record["census"], census, str(directory))
        workspace.check(_STAGE, _FILES)
        warn_if_running_again(workspace, _STAGE)
        self.name, self._directory = str(directory), directory
        self._latent, self._joinids = (np.load(directory / name, mmap_mode="r") for name in _FILES)
        self.n_latent = int(self._latent.shape[1])

    def index(self) -> CellIndex | None:
        """Index of all its cells; None without one."""
        return index_of_run(self._directory)

    def read(self, joinids: Joinids) -> Iterator[tuple[Joinids, Values]]:
        """As `Embedding` says."""
        for start in range(0, len(joinids), _READ_CELLS):
            wanted = joinids[start : start + _READ_CELLS]
            places = np.minimum(np.searchsorted(self._joinids, wanted), len(self._joinids) - 1)
            there = self._joinids[places] == wanted
            yield wanted[there], np.asarray(self._latent[places[there]], np.float32)


@dataclass(frozen=True)
class Origin:
    """The Census of a model according to its record.

    Attributes
    ----------
    identity
        The Census, as in `Census.identity`; None if there is no record.
    published
        Experiment (None: that of the Census) and name of the embedding that was published with the model; None for a
        run directory or without a record.
    array
        The array of its own that was published with the model, if it is not in obsm.
    directory
        The run directory; None for a published folder or without a record.
    """

    identity: dict[str, Any] | None = None
    published: tuple[str | None, str] | None = None
    array: str | None = None
    directory: Path | None = None

    @classmethod
    def of(cls, model: str | None) -> Origin:
        """The origin of a model in a published folder (or its URL) or a run directory; empty for anything else."""
        if model is None:
            return cls()
        source = Source.at(model)
        if (run := source.run) is not None:
            prepare = Workspace(run).whole_record("prepare")
            return cls(prepare["census"], directory=run) if prepare else cls()
        if not source.is_published:
            return cls()
        path = source.path
        record = read_provenance(fetch(model))
        census, embedding = record["census"], record["embedding"]
        run_census, run_experiment = (None, None) if path is None else _run_around(path, record)
        uri = _place(census["uri"], path) or _place(run_census, path)
        if embedding["experiment_uri"] is None and embedding.get("array"):
            return cls(census | {"uri": uri}, array=_place(embedding["array"]["uri"], path))
        experiment = _place(embedding["experiment_uri"], path) or _place(run_experiment, path)
        return cls(census | {"uri": uri}, published=(experiment, embedding["name"]))

    @property
    def section(self) -> CensusSection | None:
        """Settings to open the Census; None if its location is not known."""
        if self.identity is None:
            return None
        where = "version" if self.identity["version"] else "uri"
        if not self.identity[where]:
            return None
        return CensusSection(organism=self.identity["organism"], **{where: self.identity[where]})

    def own_embedding(self, census: Census) -> RunEmbedding | PublishedEmbedding | None:
        """The embedding computed with the model, None without a record; UserError if it cannot be read."""
        if self.directory is not None:
            return RunEmbedding(self.directory, census)
        if self.array is not None and self.identity is not None:
            _require_same(self.identity, census, self.array)
            return PublishedEmbedding.own_array(tiledb_place(self.array, "embedding"), census)
        if self.published is not None and self.identity is not None:
            experiment, name = self.published
            _require_same(self.identity, census, experiment or "the published folder")
            return PublishedEmbedding.in_obsm(experiment or census.experiment.uri, name)
        return None

    def open_embedding(self, census: Census) -> Embedding:
        """The embedding computed with the model, else `obsm["scvi"]` of the Census; UserError if neither exists."""
        try:
            if (own := self.own_embedding(census)) is not None:
                return own
        except UserError as error:
            if self.directory is not None and not isinstance(error, _NotThereError):
                raise  # it exists, but is damaged
            log.warning("%s. Using obsm['scvi'] of the Census instead, if it exists", error)
        return PublishedEmbedding.in_obsm(census.experiment.uri)


def _place(recorded: str | None, folder: Path | None) -> str | None:
    """Resolve a location in the record of a published folder; None if the path does not exist.

    Paths are relative to the folder. For a fetched record (folder None), only absolute paths and URLs are used.
    """
    place = resolved(recorded, folder or Path("/"))
    path = None if place is None else local_path(place)
    return place if path is None or (path.exists() and (folder or Path(str(recorded)).is_absolute())) else None


def _run_around(folder: Path, record: dict[str, Any]) -> tuple[str | None, str | None]:
    """Census and Experiment according to the run directory, if the published folder is still in its run directory."""
    publish = Workspace(folder.absolute().parent).record("publish") or {}
    if publish.get("publication") != record["publication"]:
        return None, None
    fingerprint = publish["fingerprint"]
    return fingerprint["inputs"]["census"]["uri"], fingerprint["config"].get("publish.experiment_uri")


def open_embedding(place: str, census: Census) -> Embedding:
    """Open the embedding that a user specifies.

    Parameters
    ----------
    place
        A name in the Census' obsm, a run directory, or the URI of an Experiment with `obsm["scvi"]`.
    census
        The Census of the embedding.

    Raises
    ------
    UserError
        The embedding does not exist, or is of another Census.
    """
    source = Source.at(place)
    if source.run is not None:
        return RunEmbedding(source.run, census)
    if "/" not in place:
        return PublishedEmbedding.in_obsm(census.experiment.uri, place)
    if source.kind is Kind.MISSING:
        raise UserError(f"{place} does not exist; give a run directory, an Experiment, or a name in obsm")
    uri = tiledb_place(place, "embedding")
    if is_array(uri):
        return PublishedEmbedding.own_array(uri, census)
    return PublishedEmbedding.in_obsm(uri)


def prove_embedding(
    embedding: Embedding, joinids: Joinids, census: Census, model: scvi.model.SCVI, description: ModelDescription
) -> None:
    """UserError if the embedding was not computed by this model: embeds its first cells again and compares them.

    If the encoder uses the batch, only the number of dimensions and the presence of cells are checked.

    Parameters
    ----------
    embedding
        The embedding of the Census' cells.
    joinids
        int64 (cells,), ascending: cells of the Census.
    census
        The open Census.
    model, description
        The model.
    """
    if embedding.n_latent != model.module.n_latent:
        raise UserError(
            f"{embedding.name} has {embedding.n_latent} dimensions, the model {model.module.n_latent}: it is another"
            " model's embedding"
        )
    found = (block for block in embedding.read(joinids) if len(block[0]))
    there, published = next(found, (np.empty(0, np.int64), np.empty((0, 0), np.float32)))
    if not len(there):
        raise UserError(f"{embedding.name} has no cell of {census.identity['uri']}")
    if description.arguments["encode_covariates"]:
        return  # the encoder uses the batch, and the batches that were used are not known
    there, published = there[:_PROVEN_CELLS], published[:_PROVEN_CELLS]
    genes = locate_genes(census, description.genes, MIN_SHARE)
    (block,) = stream_blocks(census, there, genes, blocks=[(0, len(there))])
    proteins = read_named_proteins(census, there, description.proteins) if description.proteins else None
    latent = Encoder(model)(block.counts, np.zeros(len(there), int), proteins).mean
    difference = float(np.abs(latent - published).max())
    if not difference <= _TOLERANCE:
        raise UserError(
            f"{embedding.name} is not the embedding of this model: the first {len(there)} cells differ by up to"
            f" {difference:.2g}; open the atlas with the model that was published with it"
        )


def _require_same(stated: dict[str, Any], census: Census, what: str) -> None:
    found = census.identity
    if differing := [key for key in _SAME_CENSUS if stated[key] != found[key]]:
        raise _NotThereError(
            f"{what} embeds another Census than {found['uri']}: "
            + ", ".join(f"{key} {stated[key]} and {found[key]}" for key in differing)
            + "; soma_joinids are valid within one Census only"
        )
