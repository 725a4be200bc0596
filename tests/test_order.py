"""Every cell exactly once, in an order that seed, epoch and rank decide."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from census_scvi.counts import order
from census_scvi.counts.order import CellOrder, minibatch_sizes, validation_mask


def rows_of(cells: CellOrder, epoch: int, skip: int = 0) -> list[int]:
    """Rows of the file in the order in which they are met."""
    met: list[int] = []
    for window in cells.windows(epoch, skip):
        read = np.concatenate([np.arange(start, stop) for start, stop in window.blocks])
        met += read[window.chosen].tolist()
    return met


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "BLOCK_ROWS", 8)
    monkeypatch.setattr(order, "WINDOW_ROWS", 40)


cells = st.lists(st.booleans(), min_size=1, max_size=300).filter(any).map(np.array)


@given(wanted=cells, seed=st.integers(0, 99) | st.none(), epoch=st.integers(0, 3), world=st.integers(1, 5))
def test_each_wanted_cell_once_an_epoch_over_all_ranks(wanted, seed, epoch, world) -> None:
    shares = [rows_of(CellOrder(wanted, seed, rank, world), epoch) for rank in range(world)]
    assert sorted(row for share in shares for row in share) == np.flatnonzero(wanted).tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(wanted=cells, seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_the_order_is_a_function_of_seed_and_epoch(wanted, seed, epoch) -> None:
    assert rows_of(CellOrder(wanted, seed), epoch) == rows_of(CellOrder(wanted, seed), epoch)


@given(wanted=cells, seed=st.integers(0, 99), skip=st.integers(0, 320))
def test_what_is_skipped_is_the_beginning(wanted, seed, skip) -> None:
    assert rows_of(CellOrder(wanted, seed), 0, skip) == rows_of(CellOrder(wanted, seed), 0)[skip:]


def test_another_epoch_and_another_seed_have_another_order() -> None:
    wanted = np.ones(500, dtype=bool)
    orders = {tuple(rows_of(CellOrder(wanted, seed), epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_without_a_seed_cells_come_in_the_order_of_the_file() -> None:
    wanted = np.arange(500) % 3 == 0
    assert rows_of(CellOrder(wanted, None), 0) == np.flatnonzero(wanted).tolist()


@given(n=st.integers(2, 5000), batch=st.integers(2, 300), world=st.integers(1, 6))
def test_minibatches_take_every_cell_and_none_is_a_single_cell(n: int, batch: int, world: int) -> None:
    if n < 2 * world:
        return
    sizes = [minibatch_sizes(n, batch, world, rank) for rank in range(world)]
    assert sum(map(sum, sizes)) == n
    assert len({len(ranks) for ranks in sizes}) == 1
    assert min(map(min, sizes)) >= 2
    assert max(map(max, sizes)) <= batch + 2
    for ranks in zip(*sizes, strict=True):
        assert max(ranks) - min(ranks) <= 1


def test_a_tail_of_one_joins_the_minibatch_before_it() -> None:
    assert minibatch_sizes(257, 128) == [128, 129]
    assert minibatch_sizes(258, 128) == [128, 128, 2]
    assert minibatch_sizes(2, 128) == [2]


@given(n=st.integers(1, 3000), share=st.floats(0.01, 1.0), seed=st.integers(0, 9), many=st.sampled_from([500, 10_000]))
def test_validation_cells_are_fixed_by_the_seed(n: int, share: float, seed: int, many: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "MANY_CELLS", many)
        mask = validation_mask(n, share, seed)
        assert np.array_equal(mask, validation_mask(n, share, seed))
    assert (~mask).sum() == np.ceil(share * n)
    if n >= many:  # whole blocks but for one
        shares = [mask[start : start + 8].mean() for start in range(0, n, 8)]
        assert sum(0 < part < 1 for part in shares) <= 1
