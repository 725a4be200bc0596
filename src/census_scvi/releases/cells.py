"""The cells of two releases: which are in both, new, gone or have another label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pandas.api.types import union_categoricals

from census_scvi.census.cell_keys import Keys, cell_keys, count_keys, key_columns
from census_scvi.census.cells import read_obs, require_columns
from census_scvi.census.open import Census
from census_scvi.errors import UserError

# Largest number of changes from a label to another that are reported.
MOST_CHANGES = 200
_DATASET = "dataset_id"

Joinids = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ReleaseCells:
    """The embedded cells of a release, about 40 bytes each.

    Attributes
    ----------
    joinids
        int64 (cells,): soma_joinids in the Census of the release, ascending.
    keys
        uint64 (cells,): hash of the identity of each cell, see `cell_keys`.
    counts
        uint64 (cells,): hash of each cell's counts, see `count_keys`; None if the Census has none.
    labels
        Columns of obs by name.
    """

    joinids: Joinids
    keys: Keys
    counts: Keys | None
    labels: dict[str, pd.Categorical]

    def __len__(self) -> int:
        return len(self.joinids)


def read_cells(census: Census, obs_query: str | None, columns: Sequence[str], setting: str) -> ReleaseCells:
    """Read the cells of a filter in chunks.

    Parameters
    ----------
    census
        The open Census.
    obs_query
        Value filter; None: all cells.
    columns
        obs columns to keep as labels; dataset_id is always kept.
    setting
        Setting of the columns, for the error if obs lacks one.
    """
    columns = list(dict.fromkeys([_DATASET, *columns]))
    require_columns(census, columns, setting)
    needed = key_columns(census)
    joinids, keys, counts = [np.empty(0, np.int64)], [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    labels: dict[str, list[pd.Categorical]] = {name: [] for name in columns}
    for table in read_obs(census, obs_query, ["soma_joinid", *dict.fromkeys([*needed, *columns])], "census.obs_query"):
        obs = table.to_pandas()
        joinids.append(obs["soma_joinid"].to_numpy(np.int64))
        keys.append(cell_keys(obs[needed]))
        if (of_counts := count_keys(obs)) is not None:
            counts.append(of_counts)
        for name in columns:
            labels[name].append(pd.Categorical(obs[name].astype("category").cat.remove_unused_categories()))
    found = ReleaseCells(
        np.concatenate(joinids),
        np.concatenate(keys),
        np.concatenate(counts) if len(counts) == len(joinids) else None,
        {name: _joined(parts) for name, parts in labels.items()},
    )
    return found if np.all(found.joinids[1:] > found.joinids[:-1]) else _sorted(found)


def _joined(parts: list[pd.Categorical]) -> pd.Categorical:
    """One column of all chunks, with text categories, sorted."""
    texts = [part.rename_categories([str(name) for name in part.categories]) for part in parts]
    return union_categoricals(texts, sort_categories=True) if texts else pd.Categorical([])


def _sorted(cells: ReleaseCells) -> ReleaseCells:
    order = np.argsort(cells.joinids, kind="stable")
    counts = None if cells.counts is None else cells.counts[order]
    labels = {name: values[order] for name, values in cells.labels.items()}
    return ReleaseCells(cells.joinids[order], cells.keys[order], counts, labels)


@dataclass(frozen=True)
class Shared:
    """Cells of two releases.

    Attributes
    ----------
    old, new
        The cells of each release.
    old_rows, new_rows
        int64 (shared cells,): rows of the cells of both releases, ascending in `old`.
    old_ambiguous, new_ambiguous
        Bool (cells,): cells whose identity several cells of a release have; they are not matched.
    """

    old: ReleaseCells
    new: ReleaseCells
    old_rows: Rows
    new_rows: Rows
    old_ambiguous: npt.NDArray[np.bool_]
    new_ambiguous: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.old_rows)

    def labels(self, column: str) -> tuple[pd.Categorical, pd.Categorical]:
        """Labels of the shared cells in the old and in the new release."""
        return self.old.labels[column][self.old_rows], self.new.labels[column][self.new_rows]

    def relabelled(self, column: str) -> npt.NDArray[np.bool_]:
        """Whether each shared cell has another label in the new release, bool (shared cells,)."""
        old, new = self.labels(column)
        places = pd.Index(new.categories).get_indexer(old.categories)
        codes = np.where(old.codes >= 0, np.append(places, -1)[old.codes], -1)
        missing = (old.codes < 0) != (new.codes < 0)
        return np.asarray(((codes != new.codes) & (old.codes >= 0) & (new.codes >= 0)) | missing)

    @cached_property
    def recounted(self) -> npt.NDArray[np.bool_] | None:
        """Whether each shared cell has other counts in the new release; None if a Census does not say."""
        if self.old.counts is None or self.new.counts is None:
            return None
        return self.old.counts[self.old_rows] != self.new.counts[self.new_rows]

    def changes(self, column: str) -> list[dict[str, Any]]:
        """Changes of labels, the most frequent first: `old`, `new`, `cells`."""
        rows = np.flatnonzero(self.relabelled(column))
        old, new = (values[rows].astype(object) for values in self.labels(column))
        counted = pd.DataFrame({"old": old, "new": new}).value_counts(dropna=False).head(MOST_CHANGES)
        names = [[None if pd.isna(name) else str(name) for name in pair] for pair in counted.index]
        return [{"old": one, "new": other, "cells": int(n)} for (one, other), n in zip(names, counted, strict=True)]

    def by_dataset(self) -> list[dict[str, Any]]:
        """Numbers of cells of each dataset: old, new, in both, gone, added; those that changed most first."""
        old, new = self.old.labels[_DATASET], self.new.labels[_DATASET]
        numbers = {
            "old": _numbers(old),
            "new": _numbers(new),
            "shared": _numbers(new[self.new_rows]),
            "gone": _numbers(old[~_marked(len(old), self.old_rows) & ~self.old_ambiguous]),
            "added": _numbers(new[~_marked(len(new), self.new_rows) & ~self.new_ambiguous]),
        }
        frame = pd.DataFrame(numbers).fillna(0).astype(int)
        order = (frame["gone"] + frame["added"]).sort_values(ascending=False, kind="stable").index
        return frame.loc[order].rename_axis("dataset").reset_index().to_dict("records")

    def numbers(self) -> dict[str, int | None]:
        """Numbers of cells: in each release, in both, new, gone, not matched, with other counts."""
        ambiguous = int(self.old_ambiguous.sum()), int(self.new_ambiguous.sum())
        return {
            "old": len(self.old),
            "new": len(self.new),
            "shared": len(self),
            "gone": len(self.old) - len(self) - ambiguous[0],
            "added": len(self.new) - len(self) - ambiguous[1],
            "old_ambiguous": ambiguous[0],
            "new_ambiguous": ambiguous[1],
            "recounted": None if self.recounted is None else int(self.recounted.sum()),
        }


def _numbers(labels: pd.Categorical) -> pd.Series:
    numbers = pd.Series(np.bincount(labels.codes[labels.codes >= 0], minlength=len(labels.categories)))
    return numbers.set_axis(labels.categories)


def match(old: ReleaseCells, new: ReleaseCells, places: tuple[str, str]) -> Shared:
    """Find the cells that are in both releases.

    Parameters
    ----------
    old, new
        The cells of each release.
    places
        Locations of the releases, for the message.

    Raises
    ------
    UserError
        There is no such cell.
    """
    (old_keys, old_unique), (new_keys, new_unique) = _unique(old.keys), _unique(new.keys)
    _, in_old, in_new = np.intersect1d(old_keys, new_keys, assume_unique=True, return_indices=True)
    old_rows, new_rows = old_unique[in_old], new_unique[in_new]
    if not len(old_rows):
        datasets = [set(cells.labels[_DATASET].categories) for cells in (old, new)]
        both = datasets[0] & datasets[1]
        reason = (
            f"{len(both)} datasets are in both (the first: {min(both)}), but their cells differ"
            if both
            else f"none of the {len(datasets[0])} and {len(datasets[1])} datasets is in both"
        )
        raise UserError(
            f"{places[0]} ({len(old):,} cells) and {places[1]} ({len(new):,} cells) have no cell in common: {reason};"
            " compare two releases of the same datasets. Cells are matched by dataset_id and observation_joinid"
        )
    order = np.argsort(old_rows, kind="stable")
    repeated = np.union1d(np.setdiff1d(old.keys, old_keys), np.setdiff1d(new.keys, new_keys))
    ambiguous = [np.isin(cells.keys, repeated) for cells in (old, new)]
    return Shared(old, new, old_rows[order], new_rows[order], *ambiguous)


def _unique(keys: Keys) -> tuple[Keys, Rows]:
    """Keys that occur once, sorted, and their rows."""
    found, rows, times = np.unique(keys, return_index=True, return_counts=True)
    return found[times == 1], rows[times == 1]


def _marked(n_cells: int, rows: Rows) -> npt.NDArray[np.bool_]:
    marked = np.zeros(n_cells, bool)
    marked[rows] = True
    return marked
