"""Metrics of how well an embedding mixes batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import scib_metrics
from scib_metrics.nearest_neighbors import NeighborsResults
from sklearn.metrics import silhouette_samples

from census_scvi.config.random_streams import Stream, generator
from census_scvi.errors import UserError
from census_scvi.metrics.entropy import neighbor_entropy
from census_scvi.metrics.score import (
    BATCH,
    MIXED,
    WITHIN,
    Codes,
    Names,
    Points,
    Score,
    classified,
    mean_of,
    neighbor_graph,
    scaled_lisi,
    scored,
    usable,
)  # fmt: skip
from census_scvi.metrics.space import Space

# As in scib-metrics' own benchmark.
_KBET_NEIGHBORS, _KBET_ALPHA = 50, 0.05


def mixing(
    space: Space, column: str, batches: Names, all_batches: Names, label: str, labels: Names, donors: Names | None,
) -> list[Score]:  # fmt: skip
    """Scores of how well an embedding mixes batches.

    Parameters
    ----------
    space
        The embedding.
    column
        Name of the batch.
    batches, all_batches
        (measured cells,) and (cells,): batch of the measured cells and of all cells.
    label, labels
        Name of the label within which batches should mix, and (measured cells,): the label, None if missing.
    donors
        (measured cells,): groups that are held out and resampled as a whole; None: no groups.

    Raises
    ------
    UserError
        There are fewer than two batches.
    """
    every, all_codes = np.unique(all_batches.astype(str), return_inverse=True)
    codes = all_codes[space.measured]
    if len(np.unique(codes)) < 2:
        raise UserError(f"{column} has one value, {str(every[codes[0]])!r}; there is nothing to mix")
    numbers = generator(space.seed, Stream.SHUFFLED_LABELS)
    score = partial(scored, about=BATCH, column=column, groups=donors, seed=space.seed)
    mixed = numbers.permutation(all_codes)
    known = usable(labels)
    types = np.unique(labels[known].astype(str), return_inverse=True)[1] if known.any() else np.empty(0, np.int64)
    found = []
    per_cell = neighbor_entropy(space.neighbors, all_codes)
    level = float(neighbor_entropy(space.neighbors, mixed).mean())
    within = _entropy_within(codes[known], types, space.neighbors.shape[1])
    levels = {MIXED: level, WITHIN: within} if known.any() else {MIXED: level}
    found.append(score("entropy", mean_of(per_cell), len(codes), levels))
    most = np.log(len(every))
    found.append(
        score("entropy_scaled", mean_of(per_cell / most), len(codes), {k: v / most for k, v in levels.items()})
    )
    if known.any():
        groups = None if donors is None else donors[known]
        found += _silhouette_batch(score, space.points[known], types, codes[known], label, groups, numbers)
    kept = usable(batches)
    if len(np.unique(codes[kept])) > 1:
        groups = None if donors is None else donors[kept]
        compact = np.unique(codes[kept], return_inverse=True)[1]
        renewed = partial(score, groups=groups)
        found += classified(renewed, space.points[kept], compact, groups, mixed=True, seed=space.seed)
    graph = neighbor_graph(space.points)
    real, perfect = (_graph_mixing(graph, values) for values in (codes, mixed[space.measured]))
    for metric, statistic in real.items():
        found.append(score(metric, statistic, len(codes), {MIXED: perfect[metric](np.arange(len(codes)))}))
    return found


def _graph_mixing(graph: NeighborsResults, codes: Codes) -> dict[str, Callable[[Any], float]]:
    """iLISI, and kBET: share of the cells for which it does not reject (at 5 %) that their neighbors are well mixed."""
    compact = np.unique(codes, return_inverse=True)[1]
    lisi = scib_metrics.lisi_knn(graph, compact)
    nearer = graph.subset_neighbors(min(_KBET_NEIGHBORS, graph.n_neighbors))
    p_values = np.asarray(scib_metrics.kbet(nearer, compact)[2])
    return {
        "ilisi": partial(scaled_lisi, lisi, compact.max() + 1, keep=False),
        "kbet": mean_of((p_values >= _KBET_ALPHA).astype(float)),
    }


def _silhouette_batch(
    score: Callable[..., Score], points: Points, types: Codes, codes: Codes, label: str, groups: Names | None,
    numbers: np.random.Generator,
) -> list[Score]:  # fmt: skip
    """Batch silhouette score: mean over types of 1 - |silhouette of the batch| within a type."""
    widths = _batch_widths(points, types, codes)
    if np.isnan(widths).all():
        return []
    shuffled = codes.copy()
    for value in np.unique(types):
        rows = np.flatnonzero(types == value)
        shuffled[rows] = codes[numbers.permutation(rows)]
    level = _mean_over_types(_batch_widths(points, types, shuffled), types, np.arange(len(types)))
    statistic = partial(_mean_over_types, widths, types)
    note = f"silhouette_batch within {label}"
    return [score("silhouette_batch", statistic, len(types), {MIXED: level}, groups=groups, note=note)]


def _batch_widths(points: Points, types: Codes, codes: Codes) -> npt.NDArray[np.float64]:
    """1 - |silhouette of the batch| within each type; NaN for types with one batch, or as many batches as cells."""
    widths = np.full(len(types), np.nan)
    for value in np.unique(types):
        rows = types == value
        batches = np.unique(codes[rows], return_inverse=True)[1]
        if 1 < batches.max() + 1 < rows.sum():
            widths[rows] = 1 - np.abs(silhouette_samples(points[rows], batches))
    return widths


def _mean_over_types(widths: npt.NDArray[np.float64], types: Codes, rows: Any) -> float:
    values, of_type = widths[rows], types[rows]
    there = ~np.isnan(values)
    if not there.any():
        return float("nan")
    numbers = np.bincount(of_type[there])
    sums = np.bincount(of_type[there], weights=values[there])
    return float((sums[numbers > 0] / numbers[numbers > 0]).mean())


def _entropy_within(codes: Codes, types: Codes, n_neighbors: int) -> float:
    """Expected entropy if batches are perfectly mixed within each type and types are separated."""
    total = 0.0
    for value in np.unique(types):
        shares = np.bincount(codes[types == value]) / (types == value).sum()
        shares = shares[shares > 0]
        # The entropy of a sample of n is biased downwards by (values - 1) / 2n (Miller and Madow).
        expected = -(shares * np.log(shares)).sum() - (len(shares) - 1) / (2 * n_neighbors)
        total += max(expected, 0.0) * (types == value).sum()
    return total / max(len(types), 1)
