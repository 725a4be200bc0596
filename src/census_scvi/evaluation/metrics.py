"""The metrics of the Census' embedding benchmark: how well an embedding keeps biology, and mixes batches.

Two modes. `legacy` computes what the published script computed. `sound` mends it: whole donors are held out of the
classifiers, silhouette_batch is taken within the label that it names, and every value stands beside what chance, or
perfect mixing, would give, with an interval.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import scib_metrics
from scib_metrics.nearest_neighbors import NeighborsResults
from scib_metrics.utils import silhouette_samples
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from census_scvi.errors import UserError
from census_scvi.evaluation import classify, entropy
from census_scvi.evaluation.interval import interval
from census_scvi.query.clusters import LeidenGraph
from census_scvi.query.neighbours import NeighbourIndex

log = logging.getLogger(__name__)

SOUND, LEGACY = "sound", "legacy"
BIOLOGY, BATCH = "biology", "batch"
CHANCE, MIXED, WITHIN = "chance", "perfectly mixed", "mixed within types"
# Neighbours of the graph metrics, as scib-metrics' own benchmark takes them.
_LISI_NEIGHBOURS, _KBET_NEIGHBOURS, _KBET_ALPHA = 90, 50, 0.05
_RESOLUTIONS = tuple(np.linspace(0.2, 2, 10).round(1).tolist())
# Of the draws that give chance levels, beside the seed.
_SHUFFLE = 9
# Classifiers are asked for so many classes at most, the commonest: to the SVM each pair is a problem of its own.
MOST_CLASSES = 100
FEWEST_CELLS = 10

Points = npt.NDArray[np.float32]
Names = npt.NDArray[np.object_]
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """One row of the table.

    Attributes
    ----------
    metric
        Its name in the published tables.
    about
        `biology` or `batch`.
    column
        The label, or the batch, that it is of.
    value
        The higher, the better: biology kept, batches mixed.
    low, high
        Interval of 95 %, by drawing donors anew (cells, where there are fewer than five); None in legacy mode.
    levels
        What to hold it against: `chance`, or `perfectly mixed` and `mixed within types`.
    cells
        How many it was measured on.
    note
        What a reader should know: what was held out, which cells were left out.
    """

    metric: str
    about: str
    column: str
    value: float
    low: float | None = None
    high: float | None = None
    levels: dict[str, float] = field(default_factory=dict)
    cells: int = 0
    note: str = ""


class Space:
    """An embedding of the cells of a slice.

    Parameters
    ----------
    points
        float32 (cells, dimensions).
    measured
        int64 (measured cells,): rows of those whose metrics are taken; neighbours of the entropy are sought among all.
    seed
        Of whatever is random.
    """

    def __init__(self, points: Points, measured: npt.NDArray[np.int64], seed: int) -> None:
        self.measured, self.seed = measured, seed
        self.points = np.ascontiguousarray(points[measured], np.float32)
        self._all = points

    @cached_property
    def neighbours(self) -> npt.NDArray[np.int64]:
        """int64 (measured cells, 200): rows of the neighbours among all cells, the cell itself among them."""
        index = NeighbourIndex(self._all, exact_cells=len(self._all), seed=self.seed)
        blocks = np.array_split(self.points, max(len(self.points) // 1000, 1))
        return np.concatenate([index.query(block, entropy.NEIGHBOURS)[1] for block in blocks])

    @cached_property
    def clusterings(self) -> list[Codes]:
        """Leiden clusters of the measured cells at ten resolutions."""
        graph = LeidenGraph(self.points, self.seed)
        return [np.asarray(graph.clusters(resolution).codes, np.int64) for resolution in _RESOLUTIONS]


def biology(space: Space, column: str, labels: Names, donors: Names | None, batches: Names, mode: str) -> list[Score]:
    """How well an embedding keeps a label.

    Parameters
    ----------
    space
        The embedding.
    column
        Name of the label.
    labels, batches
        (measured cells,): the label, missing (None) where it says nothing, and the batch.
    donors
        (measured cells,): held out and drawn as a whole; None: there are none.
    mode
        `sound` or `legacy`.

    Raises
    ------
    UserError
        Fewer than two labels of ten cells or more.
    """
    known = _usable(labels, mode)
    names, codes = np.unique(labels[known].astype(str), return_inverse=True)
    if len(names) < 2:
        raise UserError(
            f"{column} has too few usable values, {len(names)} (known, and of {FEWEST_CELLS} measured cells or more);"
            " two are needed"
        )
    points = space.points[known]
    groups = None if donors is None else donors[known]
    shuffled = np.random.default_rng([space.seed, _SHUFFLE]).permutation(codes)
    left_out = f"{(~known).sum():,} cells without a usable label left out" if not known.all() else ""
    score = partial(_scored, about=BIOLOGY, column=column, mode=mode, groups=groups, seed=space.seed, note=left_out)
    clusterings = [clusters[known] for clusters in space.clusterings]
    found = []
    best = int(np.argmax([normalized_mutual_info_score(codes, clusters) for clusters in clusterings]))
    for metric, agreement in (("leiden_nmi", normalized_mutual_info_score), ("leiden_ari", adjusted_rand_score)):
        chance = max(agreement(shuffled, clusters) for clusters in clusterings)
        rows_agree = partial(_agreement, agreement, codes, clusterings[best])
        found.append(score(metric, rows_agree, len(codes), {CHANCE: chance}))
    widths = (silhouette_samples(points, codes) + 1) / 2
    chance = float(((silhouette_samples(points, shuffled) + 1) / 2).mean())
    found.append(score("silhouette_label", _mean_of(widths), len(codes), {CHANCE: chance}))
    found += _classified(score, points, codes, groups, mode, mixed=False, seed=space.seed)
    if mode == SOUND:
        graph = _graph(points)
        real, random = (
            partial(_scaled_lisi, scib_metrics.lisi_knn(graph, values), len(names), keep=True)
            for values in (codes, shuffled)
        )
        found.append(score("clisi", real, len(codes), {CHANCE: random(np.arange(len(codes)))}))
        if len(np.unique(batches[known].astype(str))) > 1:
            found.append(_isolated(points, column, names[codes], names[shuffled], batches[known], left_out))
    return found


def batch(
    space: Space, column: str, batches: Names, all_batches: Names, label: str, labels: Names, donors: Names | None,
    mode: str,
) -> list[Score]:  # fmt: skip
    """How well an embedding mixes batches.

    Parameters
    ----------
    space
        The embedding.
    column
        Name of the batch.
    batches, all_batches
        (measured cells,) and (cells,): the batch.
    label, labels
        Name of the label within which batches are mixed, and (measured cells,): the label, missing where None.
    donors
        (measured cells,): held out and drawn as a whole; None: there are none.
    mode
        `sound` or `legacy`.

    Raises
    ------
    UserError
        Fewer than two batches.
    """
    every, all_codes = np.unique(all_batches.astype(str), return_inverse=True)
    codes = all_codes[space.measured]
    if len(np.unique(codes)) < 2:
        raise UserError(f"{column} has one value, {str(every[codes[0]])!r}; there is nothing to mix")
    generator = np.random.default_rng([space.seed, _SHUFFLE])
    score = partial(_scored, about=BATCH, column=column, mode=mode, groups=donors, seed=space.seed)
    mixed = generator.permutation(all_codes)
    known = _usable(labels, mode)
    types = np.unique(labels[known].astype(str), return_inverse=True)[1] if known.any() else np.empty(0, np.int64)
    found = []
    per_cell = entropy.neighbour_entropy(space.neighbours, all_codes)
    level = float(entropy.neighbour_entropy(space.neighbours, mixed).mean())
    within = _entropy_within(codes[known], types, space.neighbours.shape[1])
    levels = {MIXED: level, WITHIN: within} if known.any() else {MIXED: level}
    found.append(score("entropy", _mean_of(per_cell), len(codes), levels))
    if mode == SOUND:
        most = np.log(len(every))
        found.append(
            score("entropy_scaled", _mean_of(per_cell / most), len(codes), {k: v / most for k, v in levels.items()})
        )
    if known.any():
        groups = None if donors is None else donors[known]
        found += _silhouette_batch(score, space.points[known], types, codes[known], label, groups, generator)
    kept = _usable(batches, mode)
    if len(np.unique(codes[kept])) > 1:
        groups = None if donors is None else donors[kept]
        compact = np.unique(codes[kept], return_inverse=True)[1]
        renewed = partial(score, groups=groups)
        found += _classified(renewed, space.points[kept], compact, groups, mode, mixed=True, seed=space.seed)
    if mode == SOUND:
        graph = _graph(space.points)
        real, perfect = (_graph_mixing(graph, values) for values in (codes, mixed[space.measured]))
        for metric, statistic in real.items():
            found.append(score(metric, statistic, len(codes), {MIXED: perfect[metric](np.arange(len(codes)))}))
    return found


def _graph_mixing(graph: NeighborsResults, codes: Codes) -> dict[str, Callable[[Any], float]]:
    """iLISI, and kBET: share of the cells whose neighbours are of batches as all cells are (at 5 %)."""
    compact = np.unique(codes, return_inverse=True)[1]
    lisi = scib_metrics.lisi_knn(graph, compact)
    nearer = graph.subset_neighbors(min(_KBET_NEIGHBOURS, graph.n_neighbors))
    p_values = np.asarray(scib_metrics.kbet(nearer, compact)[2])
    return {
        "ilisi": partial(_scaled_lisi, lisi, compact.max() + 1, keep=False),
        "kbet": _mean_of((p_values >= _KBET_ALPHA).astype(float)),
    }


def _scored(
    metric: str, statistic: Callable[[Any], float], n_cells: int, levels: dict[str, float], *, about: str, column: str,
    mode: str, groups: Names | None, seed: int, note: str = "",
) -> Score:  # fmt: skip
    value = statistic(np.arange(n_cells))
    if mode == LEGACY:
        return Score(metric, about, column, value, cells=n_cells, note=note)
    low, high = interval(statistic, groups, n_cells, seed=seed)
    return Score(metric, about, column, value, low, high, levels, n_cells, note)


def _mean_of(values: npt.NDArray[np.floating]) -> Callable[[Any], float]:
    return lambda rows: float(values[rows].mean())


def _agreement(measure: Callable[[Codes, Codes], float], labels: Codes, clusters: Codes, rows: Any) -> float:
    return float(measure(labels[rows], clusters[rows]))


def _scaled_lisi(lisi: npt.NDArray[np.floating], n_values: int, rows: Any, *, keep: bool) -> float:
    """Median over cells, 0 to 1; the higher, the better labels are kept apart (`keep`), or mixed."""
    median = float(np.nanmedian(lisi[rows]))
    return (n_values - median) / (n_values - 1) if keep else (median - 1) / (n_values - 1)


def _graph(points: Points) -> NeighborsResults:
    n_neighbours = min(_LISI_NEIGHBOURS, len(points) - 1)
    distances, positions = NeighbourIndex(points, exact_cells=len(points)).query(points, n_neighbours)
    return NeighborsResults(indices=positions, distances=distances)


def _classified(
    score: Callable[..., Score],
    points: Points,
    codes: Codes,
    groups: Names | None,
    mode: str,
    *,
    mixed: bool,
    seed: int,
) -> list[Score]:  # fmt: skip
    """Accuracy of three classifiers, or one minus it where the label should not be told."""
    numbers = np.bincount(codes)
    kept = np.isin(codes, np.argsort(-numbers, kind="stable")[:MOST_CLASSES])
    notes = [f"classifiers: the {MOST_CLASSES} commonest of {len(numbers):,} values"] if not kept.all() else []
    points, codes = points[kept], np.unique(codes[kept], return_inverse=True)[1]
    groups = None if groups is None else groups[kept]
    if mode == LEGACY:
        found = classify.published_split(points, codes)
    else:
        found = classify.held_out(points, codes, groups, "donors", seed=seed)
        notes.append(f"classifiers: {found.held_out} held out")
    level = {MIXED: 1 - found.majority} if mixed else {CHANCE: found.majority}
    scores = []
    for name, right in found.right.items():
        statistic = _mean_of((~right if mixed else right).astype(float))
        drawn = None if groups is None else groups[found.rows]
        options = {"groups": drawn, "note": "; ".join(notes)}
        scores.append(score(f"classifier_{name}", statistic, len(right), level, **options))
    return scores


def _isolated(points: Points, column: str, labels: Names, shuffled: Names, batches: Names, note: str) -> Score:
    """Silhouette of the labels that are in the fewest batches."""
    value, chance = (
        float(scib_metrics.isolated_labels(points, values.astype(str), batches.astype(str)))
        for values in (labels, shuffled)
    )
    return Score("isolated_labels", BIOLOGY, column, value, None, None, {CHANCE: chance}, len(labels), note)


def _silhouette_batch(
    score: Callable[..., Score], points: Points, types: Codes, codes: Codes, label: str, groups: Names | None,
    generator: np.random.Generator,
) -> list[Score]:  # fmt: skip
    """Mean over types of how little the silhouettes of batches differ from 0 within each."""
    widths = _batch_widths(points, types, codes)
    if np.isnan(widths).all():
        return []
    shuffled = codes.copy()
    for value in np.unique(types):
        rows = np.flatnonzero(types == value)
        shuffled[rows] = codes[generator.permutation(rows)]
    level = _mean_over_types(_batch_widths(points, types, shuffled), types, np.arange(len(types)))
    statistic = partial(_mean_over_types, widths, types)
    note = f"silhouette_batch within {label}"
    return [score("silhouette_batch", statistic, len(types), {MIXED: level}, groups=groups, note=note)]


def _batch_widths(points: Points, types: Codes, codes: Codes) -> npt.NDArray[np.float64]:
    """1 - |silhouette of the batch| within each type; NaN in a type of one batch, or of as many as cells."""
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


def _entropy_within(codes: Codes, types: Codes, n_neighbours: int) -> float:
    """Entropy if the batches of each type were mixed, and the types apart: as mixed as biology allows."""
    total = 0.0
    for value in np.unique(types):
        shares = np.bincount(codes[types == value]) / (types == value).sum()
        shares = shares[shares > 0]
        # A sample of n has less entropy than what it is drawn from, by (values - 1) / 2n (Miller and Madow).
        expected = -(shares * np.log(shares)).sum() - (len(shares) - 1) / (2 * n_neighbours)
        total += max(expected, 0.0) * (types == value).sum()
    return total / max(len(types), 1)


def _usable(labels: Names, mode: str) -> npt.NDArray[np.bool_]:
    """Cells whose label is there and, in sound mode, has ten cells or more."""
    there = np.array([label is not None for label in labels])
    names, numbers = np.unique(labels[there].astype(str), return_counts=True)
    usable = there.copy()
    usable[there] = np.isin(labels[there].astype(str), names[numbers >= (1 if mode == LEGACY else FEWEST_CELLS)])
    return usable
