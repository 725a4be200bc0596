"""Compiled code: whether it can be used on this machine, and the threads it runs in."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

log = logging.getLogger(__name__)


def works(compare: Callable[[], None], name: str) -> bool:
    """Whether `compare`, which compiles something and compares it with torch, succeeds; the log says why not.

    Parameters
    ----------
    compare
        Raises ArithmeticError where the results differ, or whatever the compiler raises.
    name
        Name of the compared implementation, for the log.
    """
    try:
        compare()
    except Exception as error:  # whatever compilers raise: torch does without them
        log.warning(
            "%s cannot be used here (%s: %s); torch's own, slower operations are used instead",
            name,
            type(error).__name__,
            (str(error).strip().splitlines() or ["no reason given"])[0],
        )
        return False
    return True


def require_equal(found: torch.Tensor | None, expected: torch.Tensor | None, tolerance: float) -> None:
    """ArithmeticError where a result differs from torch's by more than this share of the largest."""
    if found is None or expected is None:
        return
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference < tolerance:
        raise ArithmeticError(f"the relative difference of its results from torch's is {difference:.1e}")


def in_threads(work: Callable[[int], None], parts: int) -> None:
    """`work(part)` for each of `range(parts)`, each in its own thread; returns when all are done."""
    if parts == 1:
        work(0)
    else:
        list(_threads(parts, os.getpid()).map(work, range(parts)))


@cache
def _threads(number: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked process does not inherit its parent's."""
    return ThreadPoolExecutor(number, thread_name_prefix="step")
