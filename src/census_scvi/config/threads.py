"""Number of threads of functions that take it as an argument."""

from __future__ import annotations

import os


def n_jobs() -> int:
    """OMP_NUM_THREADS, which the other functions of torch and scikit-learn heed; without it -1, a thread per core."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else -1
