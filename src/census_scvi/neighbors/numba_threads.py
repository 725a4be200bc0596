"""Start numba's threads without a change to the number of threads of torch and scikit-learn."""

from __future__ import annotations

import numba
from threadpoolctl import threadpool_limits


def start_numba_threads() -> None:
    """Call this before functions of scanpy, UMAP or pynndescent that use numba's threads.

    numba starts them when a function first needs them, and then sets the number of OpenMP threads of the process to
    the number of cores, whatever OMP_NUM_THREADS says. On a busy machine the threads of torch and scikit-learn then
    wait for each other, and a search of neighbors takes ten times the CPU time.
    """
    with threadpool_limits(limits=None):  # restores the numbers
        numba.get_num_threads()
