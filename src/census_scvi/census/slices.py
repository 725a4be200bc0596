"""Slices of a Census: cells that match a filter, their obs, their counts and their positions in an embedding."""

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

# Cells read at a time.
_OBS_BLOCK, _COUNT_BLOCK = 2**16, 4096

Joinids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


class Embedding(Protocol):
    """Positions of a Census' cells.

    Attributes
    ----------
    name
        Its location, for messages.
    n_latent
        Its dimensions.
    """

    name: str
    n_latent: int

    def read(self, joinids: Joinids) -> Iterator[tuple[Joinids, Values]]:
        """Those of the cells, ascending, that have a position, in blocks, and float32 (cells, n_latent)."""
        ...


def choose_cells(
    census: Census,
    obs_filter: str | None,
    *,
    max_cells: int,
    numbers: np.random.Generator,
    setting: str = "obs_filter",
) -> tuple[Joinids, int]:
    """Cells that match a filter.

    Parameters
    ----------
    census
        The open Census.
    obs_filter
        Value filter on obs; None: all cells.
    max_cells
        Of more matching cells, that many are drawn at random.
    numbers
        Random numbers of that draw.
    setting
        Setting or argument that holds the filter, for errors.

    Returns
    -------
    soma_joinids, int64 (cells,), ascending, and the number of cells that match.

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
    """As `choose_cells`, with the batch of each cell: the combination of its values in the columns `batch_key`."""
    cells = select_cells(census, obs_filter, batch_key, setting)
    rows = _drawn(len(cells), max_cells, numbers)
    return Cells(cells.joinids[rows], cells.batch_codes[rows], cells.batches)


def _drawn(n_cells: int, max_cells: int, numbers: np.random.Generator) -> npt.NDArray[np.int64]:
    places = draw(n_cells, max_cells, numbers)
    if len(places) < n_cells:
        log.info("%s of %s cells sampled at random", f"{len(places):,}", f"{n_cells:,}")
    return places


def read_obs_of(census: Census, joinids: Joinids, columns: list[str] | None = None) -> pd.DataFrame:
    """Obs of cells, ascending, with the column soma_joinid.

    Parameters
    ----------
    census
        The open Census.
    joinids
        int64 (cells,), ascending.
    columns
        obs columns to read in addition to soma_joinid; None: all.
    """
    groups = (np.arange(*rows) for rows in consecutive(0, len(joinids), _OBS_BLOCK))
    return pd.concat([frame for _, frame in stream_obs(census, joinids, groups, columns)])


def read_counts_of(census: Census, joinids: Joinids, gene_joinids: npt.NDArray[np.int64]) -> Iterator[Block]:
    """Raw counts of cells, ascending, in blocks, with a progress bar; genes as `stream_blocks` takes them."""
    with progress_bar(len(joinids), "counts") as bar:
        for block in stream_blocks(census, joinids, gene_joinids, blocks=tile_runs(joinids, _COUNT_BLOCK)):
            yield block
            bar.update(block.counts.shape[0])


def read_positions(embedding: Embedding, joinids: Joinids) -> tuple[Joinids, Values]:
    """Positions of cells in an embedding, with a progress bar.

    Parameters
    ----------
    embedding
        The embedding.
    joinids
        int64 (cells,), ascending.

    Returns
    -------
    Those of the cells that have a position, int64 (cells,), and float32 (cells, n_latent).
    """
    found, positions = [np.empty(0, np.int64)], [np.empty((0, embedding.n_latent), np.float32)]
    with progress_bar(len(joinids), "embeddings") as bar:
        for cells, values in embedding.read(joinids):
            found.append(cells)
            positions.append(values)
            bar.update(len(cells))
    return np.concatenate(found), np.concatenate(positions)
