"""Independent streams of random numbers from the setting `seed`; each stream has its own number."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Stream(IntEnum):
    """Purpose of random numbers. A number is never reassigned, so that later versions draw the same from a seed."""

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
    REFERENCE_CELLS = 11
    COMPARED_CELLS = 16
    REPLAYED_CELLS = 17
    HELD_OUT_CELLS = 18  # with 0 for new cells, 1 for others
    DECISION_CELLS = 19  # with the number of the group
    TRAINING_CELLS = 12
    SEARCHED_SETTINGS = 13  # with the number of the setting
    CLASSIFIER_CELLS = 21
    CLASSIFIER_VALIDATION = 22
    CLASSIFIER_INTERPRETATION = 23
    CLASSIFIER_KEPT_CELLS = 24
    LABELLED_CELLS = 30  # with the epoch
    INDEX_CELLS = 31
    RECALL_CELLS = 32
    PREDICTED_CELLS = 33


def generator(seed: int, stream: Stream, *numbers: int) -> np.random.Generator:
    """Generator of a stream; `numbers` select a part of the stream, as the comments in `Stream` describe."""
    return np.random.default_rng([seed, stream, *numbers])


def draw(n_cells: int, size: int, numbers: np.random.Generator) -> npt.NDArray[np.int64]:
    """Sample positions of `n_cells` cells without replacement, int64 (size,), ascending; all if `size` >= `n_cells`."""
    if size >= n_cells:
        return np.arange(n_cells)
    return np.sort(numbers.choice(n_cells, size, replace=False))
