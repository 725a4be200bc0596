"""The streams of random numbers that follow from the setting `seed`: one number each, so that none repeats another."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Stream(IntEnum):
    """What random numbers are for. Numbers are not used again: with the same seed a later version draws the same."""

    VALIDATION_CELLS = 0
    CELLS_OF_EPOCH = 1  # with the epoch and the rank
    BLOCKS_OF_EPOCH = 2  # with the epoch
    RUNS_OF_FILE = 3
    CELLS_OF_POOL = 4  # with the number of the pool
    GATE_CELLS = 5
    EVALUATED_CELLS = 6
    CELLS_FOR_GENES = 7
    MEASURED_CELLS = 8
    SHUFFLED_LABELS = 9
    MINIFIED_CELLS = 10


def generator(seed: int, stream: Stream, *numbers: int) -> np.random.Generator:
    """The generator of a stream; `numbers` select a part of the stream, as the table says."""
    return np.random.default_rng([seed, stream, *numbers])


def draw(n_cells: int, size: int, numbers: np.random.Generator) -> npt.NDArray[np.int64]:
    """Random places among `n_cells` cells, int64 (size,), ascending, none twice; all places where there are no more."""
    if size >= n_cells:
        return np.arange(n_cells)
    return np.sort(numbers.choice(n_cells, size, replace=False))
