"""Held-out cells, on which ways to renew a model are measured: which they are, and their counts and labels."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.census.open import Census
from census_scvi.census.slices import read_counts_of, read_obs_of
from census_scvi.config.random_streams import Stream, draw, generator
from census_scvi.errors import UserError
from census_scvi.fine_tuning.new_cells import NewCells
from census_scvi.fine_tuning.seen_cells import Keys, prepared_keys, run_of
from census_scvi.model.source import Source
from census_scvi.report.slice import VAGUE
from census_scvi.training.recorded_split import recorded_split
from census_scvi.workspace import Workspace

log = logging.getLogger(__name__)

# Share of the new cells that is held out; of the others, too, if the model's own validation cells are not known.
_SHARE = 0.1
# Cells of the model, not held out, from which labels are transferred.
_REFERENCE_CELLS = 5000
_FEWEST = 10

Names = npt.NDArray[np.object_]


@dataclass(frozen=True)
class Group:
    """Some cells.

    Attributes
    ----------
    obs
        Their obs.
    counts
        CSR float32 (cells, genes): raw counts, genes in the model's order.
    labels
        object (cells,): label; None: unknown.
    batches
        object (cells,): batch label.
    """

    obs: pd.DataFrame
    counts: sp.csr_matrix
    labels: Names
    batches: Names

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class HeldOut:
    """Cells for measurements.

    Attributes
    ----------
    new, old
        Held-out cells that are new, and that the model has seen (or validated on).
    reference
        Cells that the model was trained on.
    seconds_per_cell
        Time to read a cell.
    """

    new: Group
    old: Group
    reference: Group
    seconds_per_cell: float


def held_out_keys(found: NewCells, place: str, seed: int) -> tuple[Keys, str]:
    """Keys of the cells to hold out, and where the old ones are from.

    Of the new cells a random tenth. Of the others those on which the model was validated and not trained; if it is not
    known which these are, a random tenth, which the model as it is was trained on.

    Parameters
    ----------
    found
        The cells of the Census.
    place
        The model: run directory, published folder or URL.
    seed
        Seed of the random cells.
    """
    validated = _validation_keys(place)
    new, old = np.flatnonzero(found.new), np.flatnonzero(~found.new)
    chosen = new[draw(len(new), round(_SHARE * len(new)), generator(seed, Stream.HELD_OUT_CELLS, 0))]
    if validated is None:
        drawn = old[draw(len(old), round(_SHARE * len(old)), generator(seed, Stream.HELD_OUT_CELLS, 1))]
        source = "random cells, most of which the model was trained on: its validation cells are not known"
    else:
        drawn = old[np.isin(found.keys[old], validated)]
        source = "validation cells of the model's training"
    if min(len(chosen), len(drawn)) < _FEWEST:
        raise UserError(
            f"{len(chosen):,} new cells and {len(drawn):,} others can be held out, and {_FEWEST} of each are needed to"
            " decide; fine-tune without --decide, or wait for a release with more new cells"
        )
    return np.union1d(found.keys[chosen], found.keys[drawn]), source


def _validation_keys(place: str) -> Keys | None:
    """Keys of the validation cells of a model; None if its prepared cells are not there, or it was fine-tuned."""
    run = run_of(Source.at(place))
    if run is None:
        return None
    workspace = Workspace(run)
    prepared, trained = workspace.record("prepare"), workspace.record("train")
    if prepared is None or trained is None or prepared["config"].get("fine_tune", {}).get("model"):
        return None
    path = next(run / name for name in prepared["artifacts"] if str(name).endswith(".h5ad"))
    keys = prepared_keys(path)
    if keys is None:
        return None
    split = recorded_split(path, trained)
    split.cells.close()
    return keys[split.validation] if split.n_val else None


def read_held_out(
    census: Census,
    found: NewCells,
    keys: Keys,
    gene_joinids: npt.NDArray[np.int64],
    columns: list[str],
    *,
    most: int,
    seed: int,
) -> HeldOut:
    """Read the held-out cells, and some that the model was trained on.

    Parameters
    ----------
    census, found
        The Census and its cells.
    keys
        Result of `held_out_keys`.
    gene_joinids
        int64 (genes,): the model's genes in the Census.
    columns
        obs columns to read; the first one is the label.
    most
        Maximum number of cells of each of the two groups.
    seed
        Seed of the sample.
    """
    held = np.isin(found.keys, keys)
    rows = [np.flatnonzero(mask) for mask in (held & found.new, held & ~found.new, ~held & ~found.new)]
    sizes = (most, most, _REFERENCE_CELLS)
    chosen = [
        every[draw(len(every), size, generator(seed, Stream.DECISION_CELLS, number))]
        for number, (every, size) in enumerate(zip(rows, sizes, strict=True))
    ]
    started = time.monotonic()
    new, old, reference = (_read(census, found, some, gene_joinids, columns) for some in chosen)
    return HeldOut(new, old, reference, (time.monotonic() - started) / sum(map(len, chosen)))


def _read(
    census: Census,
    found: NewCells,
    rows: npt.NDArray[np.int64],
    gene_joinids: npt.NDArray[np.int64],
    columns: list[str],
) -> Group:
    joinids = found.cells.joinids[rows]
    obs = read_obs_of(census, joinids, columns).set_index("soma_joinid")
    counts = sp.vstack([block.counts for block in read_counts_of(census, joinids, gene_joinids)], format="csr")
    labels = [None if pd.isna(label) or str(label) in VAGUE else str(label) for label in obs[columns[0]]]
    batches = np.array(found.cells.batches, dtype=object)[found.cells.batch_codes[rows]]
    return Group(obs, counts, np.array(labels, dtype=object), batches)
