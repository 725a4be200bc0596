"""Number of threads of torch for a training on small minibatches."""

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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
