import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from census_scvi.files.readahead import read_ahead


@given(st.lists(st.integers(), max_size=20), st.integers(0, 4))
def test_items_come_in_order(tasks: list[int], workers: int) -> None:
    assert list(read_ahead(lambda task: task * 2, tasks, workers)) == [task * 2 for task in tasks]


def test_an_error_in_a_worker_is_raised_where_the_item_is_used() -> None:
    items = read_ahead(lambda task: 1 // task, [1, 0], workers=1)
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_the_next_item_is_made_while_the_first_is_used() -> None:
    made = threading.Event()

    def make(task: int) -> int:
        if task == 1:
            made.set()
        return task

    items = read_ahead(make, range(10), workers=1)
    next(items)
    assert made.wait(5)


def test_leaving_early_ends_the_workers() -> None:
    items = read_ahead(lambda task: time.sleep(0.01), range(1000), workers=2)
    next(items)
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
