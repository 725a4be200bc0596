"""Read ahead: the next items are computed in the background while the current item is used; the order is kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Item = TypeVar("Item")


def read_ahead(make: Callable[[Task], Item], tasks: Iterable[Task], workers: int) -> Iterator[Item]:
    """Yield `make(task)` for each task, in order, with `workers` items computed ahead in threads.

    It uses threads instead of processes: HDF5, TileDB and numpy release the GIL while they work, and no data are
    copied between processes. An error in a worker is raised here.

    Parameters
    ----------
    make
        Called once per task, in a worker thread.
    tasks
        The tasks.
    workers
        Number of items computed ahead; 0: each item is computed when it is requested, without a thread.
    """
    if workers == 0:
        yield from map(make, tasks)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead")
    pending: deque[Future[Item]] = deque()
    remaining = iter(tasks)
    try:
        for task in remaining:
            pending.append(pool.submit(make, task))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
