"""The cells of a Census that a model has not seen, and those of them that a fine-tuning trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.census.cells import Cells, require_columns, select_cells
from census_scvi.census.open import Census
from census_scvi.census.slices import read_obs_of
from census_scvi.config.random_streams import Stream, draw, generator
from census_scvi.errors import UserError
from census_scvi.fine_tuning.seen_cells import Keys, census_keys
from census_scvi.fine_tuning.settings import NEW_BATCHES, RETRAIN, FineTuneSection
from census_scvi.model.encode import labels_with

# The Census marks one of the copies of a cell as primary.
_ONCE = "is_primary_data == True"


@dataclass(frozen=True)
class NewCells:
    """The training cells of a Census, compared with the cells that a model has seen.

    Attributes
    ----------
    cells
        All training cells, each once; batches are those of the model, then others.
    keys
        uint64 (cells,): their identity.
    new
        bool (cells,): whether the model has not seen the cell.
    n_trained
        Number of the model's batches.
    n_seen, n_gone
        Number of cells that the model has seen, and of those that are not among the training cells now.
    """

    cells: Cells
    keys: Keys
    new: npt.NDArray[np.bool_]
    n_trained: int
    n_seen: int
    n_gone: int

    @property
    def of_new_batches(self) -> npt.NDArray[np.bool_]:
        """Bool (cells,): new cells of batches that the model does not have."""
        return self.new & (self.cells.batch_codes >= self.n_trained)

    def counts(self) -> dict[str, int]:
        """Numbers of cells and batches, for records."""
        new = self.cells.batch_codes[self.new]
        return {
            "cells_in_census": len(self.cells),
            "cells_seen_before": self.n_seen,
            "cells_gone": self.n_gone,
            "new_cells": int(self.new.sum()),
            "new_batches": len(np.unique(new[new >= self.n_trained])),
        }


def find_new_cells(
    census: Census, value_filter: str | None, batch_key: list[str], batches: list[str], seen: Keys
) -> NewCells:
    """Compare the training cells of a Census with the cells that a model has seen.

    Parameters
    ----------
    census
        The newer Census.
    value_filter
        Filter of the training cells. Copies, which are not primary data, are excluded in any case.
    batch_key
        obs columns whose combination is the batch.
    batches
        Batches of the model.
    seen
        Keys of the cells that it has seen, ascending and unique.
    """
    require_columns(census, ["is_primary_data"], "fine_tune")
    once = f"({value_filter}) and {_ONCE}" if value_filter else _ONCE
    cells = select_cells(census, once, batch_key)
    _, keys = census_keys(census, once)
    first = np.zeros(len(cells), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    every = labels_with(batches, cells.batches)
    codes = np.array([every.index(label) for label in cells.batches], np.int32)[cells.batch_codes]
    known = _among(keys, seen)
    return NewCells(
        Cells(cells.joinids[first], codes[first], every),
        keys[first],
        ~known[first],
        len(batches),
        len(seen),
        len(seen) - len(np.unique(keys[known])),
    )


def _among(keys: Keys, seen: Keys) -> npt.NDArray[np.bool_]:
    """Whether each key is one of `seen`, which ascend: np.isin needs four times as much memory."""
    if not len(seen):
        return np.zeros(len(keys), bool)
    known: npt.NDArray[np.bool_] = seen[np.minimum(np.searchsorted(seen, keys), len(seen) - 1)] == keys
    return known


def training_cells(
    found: NewCells, settings: FineTuneSection, seed: int, held_out: Keys | None = None
) -> tuple[Cells, dict[str, int]]:
    """The cells that a fine-tuning trains on, and their numbers; UserError if there are none.

    In mode `continue` these are the new cells and `replay_cells` of the others; in mode `new_batches` only those of new
    batches, because cells of the model's own batches would change the weights of these; in mode `retrain` all cells.
    Cells with one of the keys `held_out` are excluded.
    """
    require_new_cells(found, settings)
    allowed = np.full(len(found.keys), True) if held_out is None else ~np.isin(found.keys, held_out)
    chosen, n_replayed = found.new & allowed, 0
    if settings.mode == NEW_BATCHES:
        chosen &= found.of_new_batches
        if not chosen.any():
            raise UserError(
                f"all {int(found.new.sum()):,} new cells are of batches that the model has, and mode new_batches trains"
                " only the weights of others; set fine_tune.mode to continue, or embed them with the model as it is"
            )
    elif settings.mode == RETRAIN:
        chosen = allowed
    elif settings.replay_cells:
        old = np.flatnonzero(~found.new & allowed)
        replayed = old[draw(len(old), settings.replay_cells, generator(seed, Stream.REPLAYED_CELLS))]
        chosen[replayed], n_replayed = True, len(replayed)
    codes = found.cells.batch_codes[chosen]
    used = np.flatnonzero(np.bincount(codes, minlength=len(found.cells.batches)))
    used = np.union1d(np.arange(found.n_trained), used)  # batches without a cell here are not added to the model
    position = np.full(len(found.cells.batches), -1, np.int32)
    position[used] = np.arange(len(used))
    cells = Cells(found.cells.joinids[chosen], position[codes], [found.cells.batches[code] for code in used])
    return cells, {**found.counts(), "replayed_cells": n_replayed}


def require_new_cells(found: NewCells, settings: FineTuneSection) -> None:
    """UserError if the model has seen all cells."""
    if not found.new.any():
        raise UserError(
            f"the model {settings.model} has seen all {len(found.cells):,} training cells of this Census: there is"
            " nothing to fine-tune; set census.uri or census.version to a newer Census"
        )


def new_by(census: Census, found: NewCells, column: str) -> Mapping[str, int]:
    """Number of new cells by label of an obs column, most frequent first."""
    obs: pd.DataFrame = read_obs_of(census, found.cells.joinids[found.new], [column])
    counts = obs[column].astype(str).value_counts()
    return {str(label): int(count) for label, count in counts.items()}


def seen_after(found: NewCells, chosen: Cells, seen: Keys) -> Keys:
    """Keys of the cells that the model has seen after a fine-tuning on some cells: ascending and unique."""
    rows = np.searchsorted(found.cells.joinids, chosen.joinids)
    return np.union1d(seen, found.keys[rows])


def as_text(found: NewCells, by_dataset: Mapping[str, int], model: str) -> list[str]:
    """Lines of `--check`."""
    counts: dict[str, Any] = found.counts()
    lines = [
        f"{model} has seen {counts['cells_seen_before']:,} cells; {counts['cells_gone']:,} of them are not among the"
        " training cells of this Census",
        f"this Census has {counts['cells_in_census']:,} training cells, each once: {counts['new_cells']:,} are new,"
        f" in {counts['new_batches']:,} new batches",
    ]
    return lines + [f"  {count:>9,}  {label}" for label, count in list(by_dataset.items())[:_MOST_DATASETS]]


_MOST_DATASETS = 20
