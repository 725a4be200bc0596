"""Label shares by a weighted vote of neighbors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def label_shares(weights: npt.NDArray[np.floating], codes: npt.NDArray[np.integer], n_labels: int) -> npt.NDArray[Any]:
    """Share of each label in the total weight of a cell's neighbors, (cells, labels), in the dtype of the weights.

    Parameters
    ----------
    weights, codes
        (cells, neighbors): weight of each neighbor, and code of its label.
    n_labels
        Number of labels.
    """
    shares = np.zeros((len(weights), n_labels), weights.dtype)
    np.add.at(shares, (np.repeat(np.arange(len(weights)), weights.shape[1]), codes.ravel()), weights.ravel())
    return shares / shares.sum(axis=1, keepdims=True)
