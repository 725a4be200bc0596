"""Identity of cells across releases: it depends on the cell, not on its place in the Census."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from census_scvi.census.cell_keys import cell_keys, count_keys, key_columns
from census_scvi.errors import UserError
from census_scvi.local_census.experiment import observation_joinids
from census_scvi.releases.cells import ReleaseCells, match


@cache
def statistics_of(dataset: int, number: int) -> tuple[float, int, float]:
    counts = np.random.default_rng([dataset, number]).integers(1, 9, 20 + number)
    return float(counts.sum()), len(counts), float(counts.var(ddof=1))


def obs_of(cells: list[tuple[int, int]], *, generated: bool, order: list[int] | None = None) -> pd.DataFrame:
    """Cells (dataset, number) of a Census; the counts of a cell follow from both numbers."""
    rows = []
    for dataset, number in cells:
        rows.append((f"dataset-{dataset}", f"{number:x}~aB3$e{dataset}", *statistics_of(dataset, number)))
    obs = pd.DataFrame(rows, columns=["dataset_id", "observation_joinid", "raw_sum", "nnz", "raw_variance_nnz"])
    if generated:  # as build-census does: by position in the dataset
        for name, group in obs.groupby("dataset_id"):
            obs.loc[group.index, "observation_joinid"] = observation_joinids(str(name), len(group))
    obs["dataset_id"] = obs["dataset_id"].astype("category")
    return obs if order is None else obs.iloc[order].reset_index(drop=True)


numbers = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), unique=True, min_size=1, max_size=40)


@settings(max_examples=30)
@given(st.data(), st.booleans())
def test_a_cell_keeps_its_key_when_others_come_and_go(data: st.DataObject, generated: bool) -> None:
    first, second = data.draw(numbers), data.draw(numbers)
    keys = [dict(zip(cells, cell_keys(obs_of(cells, generated=generated)), strict=True)) for cells in (first, second)]
    for cell in set(first) & set(second):
        assert keys[0][cell] == keys[1][cell]
    every = keys[0] | keys[1]
    assert len(set(every.values())) == len(every)


@settings(max_examples=30)
@given(numbers, st.integers(1, 10), st.booleans())
def test_keys_do_not_depend_on_chunks(cells: list[tuple[int, int]], size: int, generated: bool) -> None:
    obs = obs_of(cells, generated=generated)
    chunks = [cell_keys(obs.iloc[start : start + size]) for start in range(0, len(obs), size)]
    assert np.concatenate(chunks).tolist() == cell_keys(obs).tolist()


def test_one_census_has_both_kinds_of_ids() -> None:
    """The ids of CELLxGENE are used although the counts changed; where they are positions, the counts are."""
    named, generated = (
        obs_of([(0, n) for n in range(5)], generated=False),
        obs_of([(1, n) for n in range(5)], generated=True),
    )
    before = pd.concat([named, generated], ignore_index=True)
    after = before.assign(raw_sum=before["raw_sum"] + 1)
    same = cell_keys(before) == cell_keys(after)
    assert same.tolist() == [True] * 5 + [False] * 5
    changed = count_keys(before), count_keys(after)
    assert changed[0] is not None and changed[1] is not None
    assert (changed[0] != changed[1]).all()
    assert count_keys(before[["dataset_id"]]) is None


def test_a_variance_may_be_rounded_differently() -> None:
    obs = obs_of([(0, n) for n in range(20)], generated=True)
    other = obs.assign(raw_variance_nnz=np.nextafter(obs["raw_variance_nnz"], np.inf))
    assert cell_keys(obs).tolist() == cell_keys(other).tolist()


@pytest.mark.parametrize(
    ("columns", "used"),
    [
        (["dataset_id", "observation_joinid", "cell_type"], ["dataset_id", "observation_joinid"]),
        (["dataset_id", "raw_sum", "nnz", "raw_variance_nnz"], ["dataset_id", "raw_sum", "nnz", "raw_variance_nnz"]),
        (["dataset_id", "raw_sum"], None),
        (["observation_joinid"], None),
    ],
)
def test_columns_that_the_keys_need(columns: list[str], used: list[str] | None) -> None:
    schema = SimpleNamespace(names=columns)
    census: Any = SimpleNamespace(
        experiment=SimpleNamespace(obs=SimpleNamespace(schema=schema)), identity={"uri": "somewhere"}
    )
    if used is not None:
        assert key_columns(census) == used
        return
    with pytest.raises(UserError, match=r"somewhere: cells cannot be recognised in another release, because obs has"):
        key_columns(census)


def cells_of(keys: list[int], labels: list[str | None], counts: list[int] | None = None) -> ReleaseCells:
    """Cells of a release with these keys and cell types; the dataset is the hundreds of the key."""
    datasets = pd.Categorical([f"dataset-{key // 100}" for key in keys])
    found = {"dataset_id": datasets, "cell_type": pd.Categorical(labels)}
    return ReleaseCells(
        np.arange(len(keys)) * 3,
        np.array(keys, np.uint64),
        None if counts is None else np.array(counts, np.uint64),
        found,
    )


def test_cells_that_are_in_both_new_gone_relabelled_recounted() -> None:
    old = cells_of([1, 2, 3, 101, 102, 102, 201], ["a", "b", None, "a", "c", "c", "a"], [1, 1, 1, 1, 1, 1, 1])
    new = cells_of([301, 101, 3, 2, 1, 102], ["a", "z", "b", "b", None, "c"], [1, 1, 2, 1, 1, 1])
    shared = match(old, new, ("A", "B"))
    assert shared.old_rows.tolist() == [0, 1, 2, 3]
    assert shared.new_rows.tolist() == [4, 3, 2, 1]
    assert shared.relabelled("cell_type").tolist() == [True, False, True, True]
    assert shared.numbers() == {
        "old": 7, "new": 6, "shared": 4, "gone": 1, "added": 1, "old_ambiguous": 2, "new_ambiguous": 1, "recounted": 1,
    }  # fmt: skip
    changes = {(row["old"], row["new"]): row["cells"] for row in shared.changes("cell_type")}
    assert changes == {("a", None): 1, (None, "b"): 1, ("a", "z"): 1}
    rows = {row["dataset"]: row for row in shared.by_dataset()}
    assert rows["dataset-0"] == {"dataset": "dataset-0", "old": 3, "new": 3, "shared": 3, "gone": 0, "added": 0}
    assert (rows["dataset-2"]["gone"], rows["dataset-3"]["added"]) == (1, 1)
    assert match(cells_of([1], ["a"]), new, ("A", "B")).recounted is None


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (7, "1 datasets are in both (the first: dataset-0), but their cells differ"),
        (907, "none of the 1 and 1 datasets is in both"),
    ],
)
def test_releases_without_a_shared_cell(key: int, reason: str) -> None:
    with pytest.raises(UserError, match=r"run-1 .1 cells. and run-2 .1 cells. have no cell in common: ") as caught:
        match(cells_of([1], ["a"]), cells_of([key], ["a"]), ("run-1", "run-2"))
    assert reason in str(caught.value)
