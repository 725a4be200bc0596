"""Check whether compiled code works on this machine, and run it in threads."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

log = logging.getLogger(__name__)


def works(compare: Callable[[], None], name: str) -> bool:
    """Whether `compare` succeeds: it compiles code and compares its results with torch's. A failure is logged.

    Parameters
    ----------
    compare
        Raises ArithmeticError if the results differ, or any exception of the compiler.
    name
        Name of the compared implementation, for the log.
    """
    try:
        compare()
    except Exception as error:  # compilers raise exceptions of any kind; torch's operations are used instead
        log.warning(
            "%s cannot be used here (%s: %s); torch's own, slower operations are used instead",
            name,
            type(error).__name__,
            (str(error).strip().splitlines() or ["no reason given"])[0],
        )
        return False
    return True


def require_equal(found: torch.Tensor | None, expected: torch.Tensor | None, tolerance: float) -> None:
    """ArithmeticError if a result differs from torch's by `tolerance` or more, relative to the largest value."""
    if found is None or expected is None:
        return
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference < tolerance:
        raise ArithmeticError(f"the relative difference of its results from torch's is {difference:.1e}")


def in_threads(work: Callable[[int], None], parts: int) -> None:
    """Call `work(part)` for each of `range(parts)`, each in its own thread; returns when all are done."""
    if parts == 1:
        work(0)
    else:
        list(_threads(parts, os.getpid()).map(work, range(parts)))


@cache
def _threads(number: int, process: int) -> ThreadPoolExecutor:
    """Thread pool of this process: a forked process does not inherit the threads of its parent."""
    return ThreadPoolExecutor(number, thread_name_prefix="step")
