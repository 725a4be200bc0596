"""Number of threads of torch where other threads, or small minibatches, leave it less to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch in this block.

    With small minibatches more threads help little. On a busy machine they wait for each other, which costs up to ten
    times the CPU time.
    """
    with _threads(1):
        yield


@contextmanager
def half_of_the_threads() -> Iterator[None]:
    """Half of torch's threads in this block, for work during which others read a Census.

    With all of them, those of torch and TileDB wait for each other: an embedding on two cores takes 1.2 times as long.
    """
    with _threads(max(torch.get_num_threads() // 2, 1)):
        yield


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
