"""Read-ahead: the next items are made in the background while the current one is used, in the same order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Item = TypeVar("Item")


def read_ahead(make: Callable[[Task], Item], tasks: Iterable[Task], workers: int) -> Iterator[Item]:
    """Yield `make(task)` for each task, in order, with `workers` of them computed ahead in threads.

    Threads, not processes: HDF5, TileDB and numpy release the GIL where they spend their time, and nothing has to be
    copied between processes. An error in a worker is raised here.

    Parameters
    ----------
    make
        Called once a task, in a worker thread.
    tasks
        The tasks.
    workers
        Items made ahead; 0 makes each when it is asked for.
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
