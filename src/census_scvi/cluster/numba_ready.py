"""Importing this module initialises numba: a second of CPU time that forks of this process then do not spend."""

import numba


@numba.njit
def _nothing() -> None:
    pass


_nothing()
