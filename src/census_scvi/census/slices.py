"""Slices of a Census: cells that match a filter, with their obs, counts and embedding."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.census.cells import Cells, matching_joinids, select_cells
from census_scvi.census.open import Census
from census_scvi.census.stream import Block, consecutive, stream_blocks, stream_obs, tile_runs
from census_scvi.config.random_streams import draw
from census_scvi.terminal.progress import progress_bar

log = logging.getLogger(__name__)

# Cells per block that is read: of obs, and of counts.
_OBS_BLOCK, _COUNT_BLOCK = 2**16, 4096

Joinids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


class Embedding(Protocol):
    """An embedding of cells of a Census.

    Attributes
    ----------
    name
        Location, for messages.
    n_latent
        Number of dimensions.
    """

    name: str
    n_latent: int

    def read(self, joinids: Joinids) -> Iterator[tuple[Joinids, Values]]:
        """Yield blocks of the embedded cells among `joinids`: ascending soma_joinids, float32 (cells, n_latent)."""
        ...


def choose_cells(
    census: Census,
    obs_filter: str | None,
    *,
    max_cells: int,
    numbers: np.random.Generator,
    setting: str = "obs_filter",
) -> tuple[Joinids, int]:
    """Select cells that match a filter.

    Parameters
    ----------
    census
        The open Census.
    obs_filter
        Value filter on obs; None: all cells.
    max_cells
        If more cells match, this number of them is sampled at random.
    numbers
        Random generator for the sample.
    setting
        Setting or argument that contains the filter, for errors.

    Returns
    -------
    soma_joinids, int64 (cells,), ascending, and the number of matching cells.

    Raises
    ------
    UserError
        The filter cannot be used, or no cell matches it.
    """
    joinids = matching_joinids(census, obs_filter, setting)
    return joinids[_drawn(len(joinids), max_cells, numbers)], len(joinids)


def choose_cells_and_batches(
    census: Census,
    obs_filter: str | None,
    batch_key: list[str],
    *,
    max_cells: int,
    numbers: np.random.Generator,
    setting: str = "obs_filter",
) -> Cells:
    """Like `choose_cells`, with the batch of each cell: the combination of its values in the columns `batch_key`."""
    cells = select_cells(census, obs_filter, batch_key, setting)
    rows = _drawn(len(cells), max_cells, numbers)
    return Cells(cells.joinids[rows], cells.batch_codes[rows], cells.batches)


def _drawn(n_cells: int, max_cells: int, numbers: np.random.Generator) -> npt.NDArray[np.int64]:
    places = draw(n_cells, max_cells, numbers)
    if len(places) < n_cells:
        log.info("%s of %s cells sampled at random", f"{len(places):,}", f"{n_cells:,}")
    return places


def read_obs_of(census: Census, joinids: Joinids, columns: list[str] | None = None) -> pd.DataFrame:
    """Read obs of cells, with the column soma_joinid.

    Parameters
    ----------
    census
        The open Census.
    joinids
        int64 (cells,), ascending.
    columns
        obs columns to read in addition to soma_joinid; None: all columns.
    """
    groups = (np.arange(*rows) for rows in consecutive(0, len(joinids), _OBS_BLOCK))
    return pd.concat([frame for _, frame in stream_obs(census, joinids, groups, columns)])


def read_counts_of(census: Census, joinids: Joinids, gene_joinids: npt.NDArray[np.int64]) -> Iterator[Block]:
    """Read raw counts of cells (ascending) in blocks, with a progress bar; arguments as for `stream_blocks`."""
    with progress_bar(len(joinids), "counts") as bar:
        for block in stream_blocks(census, joinids, gene_joinids, blocks=tile_runs(joinids, _COUNT_BLOCK)):
            yield block
            bar.update(block.counts.shape[0])


def read_positions(embedding: Embedding, joinids: Joinids) -> tuple[Joinids, Values]:
    """Read the embedding of cells, with a progress bar.

    Parameters
    ----------
    embedding
        The embedding.
    joinids
        int64 (cells,), ascending.

    Returns
    -------
    soma_joinids of the cells that are embedded, int64 (cells,), and their embedding, float32 (cells, n_latent).
    """
    found, positions = [np.empty(0, np.int64)], [np.empty((0, embedding.n_latent), np.float32)]
    with progress_bar(len(joinids), "embeddings") as bar:
        for cells, values in embedding.read(joinids):
            found.append(cells)
            positions.append(values)
            bar.update(len(cells))
    return np.concatenate(found), np.concatenate(positions)
