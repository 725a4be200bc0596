"""Vectors as the metric of an index compares them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from census_scvi.errors import UserError
from census_scvi.neighbors.settings import Metric

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def scaled(vectors: Any, metric: Metric) -> Vectors:
    """The vectors, float32 in memory; for `cosine` of length 1 (zeros stay). UserError: they have NaN or infinities."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if not np.isfinite(vectors).all():
        raise UserError("the embedding has NaN or infinite values; nearest cells need finite numbers")
    if metric == "euclidean":
        return vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
