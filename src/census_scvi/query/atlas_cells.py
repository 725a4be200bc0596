"""Cells of a Census selected by a filter, with obs, embedding, and counts of a model's genes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scvi

from census_scvi.census.cells import Cells, matching_joinids, require_columns
from census_scvi.census.genes import locate_genes
from census_scvi.census.open import Census, open_census
from census_scvi.census.proteins import read_named_proteins
from census_scvi.census.settings import CensusSection
from census_scvi.census.slices import (
    Embedding,
    Joinids,
    Values,
    choose_cells,
    choose_cells_and_batches,
    read_counts_of,
    read_obs_of,
    read_positions,
)
from census_scvi.census.stream import Block
from census_scvi.config.random_streams import draw
from census_scvi.errors import UserError
from census_scvi.files.uri import without_credentials
from census_scvi.model.safe import ModelDescription
from census_scvi.neighbors.cell_index import CellIndex, nearest_matching
from census_scvi.query.mapping import MIN_SHARE
from census_scvi.query.reference import PublishedEmbedding, RunEmbedding, prove_embedding

log = logging.getLogger(__name__)

EMBEDDING = "scvi"

Model = tuple[scvi.model.SCVI, ModelDescription]


class AtlasCells:
    """Reads cells of a Census. Census and embedding are opened when they are first needed.

    Parameters
    ----------
    model
        The trained model and its description; None: no model.
    section
        The Census to open; None: no Census.
    find_embedding
        Function that returns the embedding of the Census' cells.
    """

    def __init__(
        self, model: Model | None, section: CensusSection | None, find_embedding: Callable[[Census], Embedding]
    ) -> None:
        self._model, self.section, self._find_embedding = model, section, find_embedding
        self._stack = ExitStack()
        self._proven = False

    def close(self) -> None:
        """Close the Census."""
        self._stack.close()

    @property
    def model(self) -> Model:
        """Model and description; UserError without a model."""
        if self._model is None:
            raise UserError("this needs a model: Atlas.open(model=...)")
        return self._model

    @property
    def census(self) -> Census:
        """The open Census; UserError without a Census."""
        if self.section is None:
            raise UserError("this needs the Census: Atlas.open(..., census=...)")
        return self._census

    @property
    def embedding(self) -> Embedding:
        """The embedding of the Census' cells; UserError without a Census or an embedding."""
        _ = self.census
        return self._embedding

    @cached_property
    def _census(self) -> Census:
        assert self.section is not None, "asked for where there is one"
        return self._stack.enter_context(open_census(self.section))

    @cached_property
    def _embedding(self) -> Embedding:
        found = self._find_embedding(self._census)
        log.info("embedding of the Census' cells: %s", without_credentials(found.name))
        return found

    @cached_property
    def _index(self) -> CellIndex | None:
        """Index of all cells of the embedding; None without one."""
        embedding = self.embedding
        return embedding.index() if isinstance(embedding, RunEmbedding | PublishedEmbedding) else None

    def nearest(
        self, points: Values, n_neighbors: int, obs_filter: str | None, max_cells: int
    ) -> tuple[Values, Joinids] | None:
        """Distances and soma_joinids of the nearest of all cells that match, each (points, n_neighbors).

        None: there is no index of all cells, or it is not needed, because at most `max_cells` cells match, or it does
        not help, because few of very many cells match.
        """
        index = self._index
        if index is None or index.n_cells <= max_cells:
            return None
        if obs_filter is None:
            log.info("the nearest of all %s cells are searched with the index", f"{index.n_cells:,}")
            return index.query(points, n_neighbors)
        matching = matching_joinids(self.census, obs_filter)
        return None if len(matching) <= max_cells else nearest_matching(index, points, n_neighbors, matching)

    def embedded(
        self,
        obs_filter: str | None,
        columns: list[str] | None,
        max_cells: int,
        seed: int,
        near: Joinids | None = None,
    ) -> ad.AnnData:
        """Cells with obs and embedding; the result of `Atlas.embeddings`.

        `near`: soma_joinids (cells, neighbors) of nearest cells, nearest first, that take up to half of the cells.
        """
        census, embedding = self.census, self.embedding
        require_columns(census, columns or [], "obs_columns")
        numbers = np.random.default_rng(seed)
        joinids, _ = choose_cells(census, obs_filter, max_cells=max_cells, numbers=numbers)
        if near is not None:
            nearest = _nearest_of(near, max_cells // 2)
            others = np.setdiff1d(joinids, nearest)
            joinids = np.union1d(nearest, others[draw(len(others), max_cells - len(nearest), numbers)])
        found, positions = read_positions(embedding, joinids)
        if not len(found):
            raise UserError(f"none of the {len(joinids):,} cells has an embedding in {embedding.name}")
        if len(found) < len(joinids):
            log.warning("%s cells have no embedding and are excluded", f"{len(joinids) - len(found):,}")
        return ad.AnnData(
            obs=self.obs(found, columns),
            obsm={EMBEDDING: positions},
            uns={"census": {key: value for key, value in census.identity.items() if value is not None}},
        )

    def with_batches(self, obs_filter: str | None, max_cells: int, seed: int, argument: str) -> Cells:
        """At most `max_cells` cells with their batches; error messages use `argument` as the name of the filter."""
        return choose_cells_and_batches(
            self.census,
            obs_filter,
            self.model[1].batch_key,
            max_cells=max_cells,
            numbers=np.random.default_rng(seed),
            setting=argument,
        )

    def counts(self, joinids: npt.NDArray[np.int64]) -> Iterator[Block]:
        """Raw counts of the model's genes in blocks; `joinids` must be ascending."""
        census, (_, description) = self.census, self.model
        return read_counts_of(census, joinids, locate_genes(census, description.genes, MIN_SHARE))

    def proteins(self, joinids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32] | None:
        """Raw protein counts, float32 (cells, proteins of the model); None for a model without proteins."""
        _, description = self.model
        return read_named_proteins(self.census, joinids, description.proteins) if description.proteins else None

    def obs(self, joinids: npt.NDArray[np.int64], columns: list[str] | None = None) -> pd.DataFrame:
        """Obs of cells, indexed by soma_joinid as text; `joinids` must be ascending."""
        obs = read_obs_of(self.census, joinids, columns)
        obs.index = obs["soma_joinid"].astype(str)
        obs.index.name = None
        for name in obs.select_dtypes("category"):
            obs[name] = obs[name].cat.remove_unused_categories()
        return obs

    def require_embedding_of_model(self) -> None:
        """UserError if the embedding was not computed by this model; checked once, and not without a model."""
        if self._proven or self._model is None:
            return
        census = self.census
        prove_embedding(self.embedding, matching_joinids(census, None), census, *self.model)
        self._proven = True


def _nearest_of(near: Joinids, most: int) -> Joinids:
    """At most this number of distinct cells, ascending: of each point as many of its nearest as all can have."""
    for n_neighbors in range(near.shape[1], 0, -1):
        cells = np.unique(near[:, :n_neighbors])
        if len(cells) <= most:
            return cells
    return cells[:0]
