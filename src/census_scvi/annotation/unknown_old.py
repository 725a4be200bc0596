"""Set the distance to the reference above which a cell is `unknown`, and measure how well it finds missing cell types.

Both use the reference only. Probes are cells of the reference. Each probe is compared with the cells of the other
studies, as a query cell would be: once with all of these cells, and once with those of other labels only, as if the
probe's own label were missing in the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Maximum number of probes per label and in total, and minimum number of cells of a label with probes.
_PROBES, _MOST_PROBES, _FEWEST = 200, 5000, 10
# Minimum share of the known cells that keep their label.
_LEAST_KEPT = 0.9
# Minimum number of cells of a study, and of probes among them, for its distance ratio to be measured.
_FEWEST_OF_A_STUDY, _FEWEST_PROBES = 100, 20
# The distance of a study is the first quartile over its cells: these nearest cells are of known types, even if half of
# the cells are of missing types.
_QUARTER = 0.25
# A study is far if its ratio exceeds the 90 % quantile over the reference's own studies by more than 10 % (chance).
_USUAL, _CHANCE = 0.9, 1.1
_BLOCK_DISTANCES, _LEAST_DISTANCE = 2**23, 1e-12

Distances = npt.NDArray[np.float64]
Codes = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Correction:
    """Correction of the distances of a study.

    Attributes
    ----------
    ratio
        Distance ratio: distance of the study's cells to the reference, divided by the distance of the reference's own
        cells; 1 if it is smaller than 1, or if there are too few cells.
    divisor
        The distances are divided by this number.
    far
        Whether the ratio is larger than between the reference's own studies; the divisor is then 1.
    """

    ratio: float
    divisor: float
    far: bool


@dataclass(frozen=True)
class UnknownThreshold:
    """The threshold of `unknown`, and how well it finds cells of types that the reference lacks.

    Attributes
    ----------
    distance
        Mean distance to the neighbors above which a cell is unknown.
    scales
        float64 (labels,): first quartile of the distances of a label's cells to the cells of other studies.
    usual_ratio
        Usual distance ratio between the reference's own studies (90 % quantile); larger ratios are not corrected. NaN
        if fewer than two studies have enough cells.
    known_kept
        Share of the cells of known types that are not unknown, mean over types.
    left_out_found
        Share of the cells of a missing type that are unknown, mean over types; NaN if there are too few types. For this
        and `known_kept`, each study of the reference is the query once and its distances are corrected like those of a
        query; for `left_out_found`, this query includes the cells of the missing type.
    """

    distance: float
    scales: Distances
    usual_ratio: float
    known_kept: float
    left_out_found: float

    def apply(self, distance: Distances, nearest: Codes) -> Correction:
        """The correction for cells of one study.

        Parameters
        ----------
        distance
            (cells,): mean distance to the neighbors.
        nearest
            (cells,): code of the nearest neighbor's label.
        """
        if len(distance) < _FEWEST_OF_A_STUDY:
            return Correction(1.0, 1.0, False)
        return _correct(float(np.quantile(distance / self.scales[nearest], _QUARTER)), self.usual_ratio)

    def warning(self, ratio: float) -> str:
        """The warning for a study that is far from the reference."""
        usual = (
            "it has one study with enough cells, so the usual ratio is not known"
            if np.isnan(self.usual_ratio)
            else f"the distance ratio between its own studies is up to {max(self.usual_ratio, 1.0):.1f}"
        )
        return (
            f"the distance ratio of the cells to the reference is {ratio:.1f} ({usual}): they are of another chemistry"
            " or treatment, or many are of types that the reference lacks. Check their labels with marker genes. The"
            " distance is not corrected, so cells of known types may become unknown, too"
        )


def _correct(ratio: float, usual: float) -> Correction:
    """The correction for a distance ratio, compared with the `usual` ratio; NaN if that is not known."""
    if ratio > _CHANCE * max(np.nan_to_num(usual, nan=1.0), 1.0):
        return Correction(ratio, 1.0, True)
    return Correction(max(ratio, 1.0), max(ratio, 1.0), False)


@dataclass(frozen=True)
class _Probes:
    """Cells of the reference that represent cells of a query.

    Attributes
    ----------
    labels, groups
        (probes,): code of label and study.
    weight
        (probes,): number of reference cells of the same label and study that each probe represents.
    known, known_nearest
        (probes,): mean distance to the nearest other cells, and label of the nearest one; cells of other studies only
        if `across`.
    missing, missing_nearest
        (probes,): the same for cells of other labels only; the distance is NaN if there are too few.
    across
        bool (probes,): whether another study has the label, and the other studies have enough cells.
    """

    labels: Codes
    groups: Codes
    weight: Distances
    known: Distances
    known_nearest: Codes
    missing: Distances
    missing_nearest: Codes
    across: npt.NDArray[np.bool_]


def set_threshold(
    points: npt.NDArray[np.float32], codes: Codes, groups: Codes, *, n_neighbors: int, seed: int
) -> UnknownThreshold:
    """The distance that best separates cells of missing types from cells of known types.

    Only distances at which at least 90 % of the cells of known types (mean over types) keep their label are considered.

    Parameters
    ----------
    points
        float32 (cells, dimensions): the reference, with more cells than `n_neighbors`.
    codes, groups
        (cells,): code of the label and of the study.
    n_neighbors
        Neighbors per cell.
    seed
        Seed of the random choice of the probes.
    """
    rows = _draw(codes, np.random.default_rng(seed))
    probes = _compare(points, codes, groups, rows, n_neighbors)
    scales = _scales(probes, int(codes.max()) + 1)
    sizes = np.bincount(groups)
    ratios = {
        int(group): ratio
        for group in np.unique(probes.groups)
        if (ratio := _study_ratio(probes, scales, group, sizes)) is not None
    }
    distance = _best_distance(probes)
    kept, found = _as_applied(probes, distance, scales, ratios)
    return UnknownThreshold(distance, scales, _usual(ratios), kept, found)


def _draw(codes: Codes, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Rows of the probes: some cells of each label with enough cells; if none has enough, of the largest labels."""
    numbers = np.bincount(codes)
    counted = np.flatnonzero(numbers >= min(_FEWEST, numbers.max()))
    most = max(min(_PROBES, _MOST_PROBES // len(counted)), _FEWEST)
    members = (np.flatnonzero(codes == label) for label in counted)
    return np.concatenate([generator.choice(cells, min(most, len(cells)), replace=False) for cells in members])


def _compare(
    points: npt.NDArray[np.float32], codes: Codes, groups: Codes, rows: npt.NDArray[np.int64], n_neighbors: int
) -> _Probes:
    """The probes with their distances to the other cells."""
    pairs = codes.astype(np.int64) * (int(groups.max()) + 1) + groups
    _, pair_of, cells = np.unique(pairs, return_inverse=True, return_counts=True)
    probes_of = np.bincount(pair_of[rows], minlength=len(cells))
    studies_of_label = np.bincount(np.unique(pairs) // (int(groups.max()) + 1))
    elsewhere = len(points) - np.bincount(groups)[groups[rows]]
    across = (studies_of_label[codes[rows]] > 1) & (elsewhere >= n_neighbors)
    known, missing = [], []
    squares = np.square(points).sum(axis=1)
    size = max(_BLOCK_DISTANCES // len(points), 1)
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        squared = squares[block][:, None] + squares - 2 * points[block] @ points.T  # with rounding errors
        squared[np.arange(len(block)), block] = np.inf  # not the cell itself
        away = np.where(groups[block][:, None] == groups, np.inf, squared)
        known.append(_nearest(points, block, np.where(across[start : start + size, None], away, squared), n_neighbors))
        same = codes[block][:, None] == codes
        other, at = _nearest(points, block, np.where(same, np.inf, away), n_neighbors)
        if (few := np.isnan(other)).any():  # too few cells of other labels in other studies: use its own study too
            near = np.where(same[few], np.inf, squared[few])
            other[few], at[few] = _nearest(points, block[few], near, n_neighbors)
        missing.append((other, at))
    (known_distance, known_at), (missing_distance, missing_at) = (
        tuple(np.concatenate(part) for part in zip(*blocks, strict=True)) for blocks in (known, missing)
    )
    return _Probes(
        labels=codes[rows],
        groups=groups[rows],
        weight=(cells / np.maximum(probes_of, 1))[pair_of[rows]],
        known=known_distance,
        known_nearest=codes[known_at],
        missing=missing_distance,
        missing_nearest=codes[missing_at],
        across=across,
    )


def _nearest(
    points: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], squared: npt.NDArray[np.float32], n_neighbors: int
) -> tuple[Distances, npt.NDArray[np.int64]]:
    """Mean distance to the nearest cells, and the nearest cell; NaN if fewer than `n_neighbors` have a finite value."""
    at = np.argpartition(squared, n_neighbors - 1, axis=1)[:, :n_neighbors]
    exact = np.linalg.norm(points[at].astype(np.float64) - points[rows][:, None], axis=2)
    exact[~np.isfinite(np.take_along_axis(squared, at, axis=1))] = np.nan
    first = np.where(np.isnan(exact), np.inf, exact).argmin(axis=1)
    return exact.mean(axis=1), at[np.arange(len(at)), first]


def _scales(probes: _Probes, n_labels: int) -> Distances:
    """First quartile of the distances of each label's probes; of all probes for a label without probes."""
    scales = np.full(n_labels, np.quantile(probes.known, _QUARTER))
    for label in np.unique(probes.labels):
        scales[label] = np.quantile(probes.known[probes.labels == label], _QUARTER)
    return np.maximum(scales, _LEAST_DISTANCE)


def _study_ratio(probes: _Probes, scales: Distances, group: int, sizes: npt.NDArray[np.int64]) -> float | None:
    """Distance ratio of a study of the reference; None if it has too few cells."""
    mine = (probes.groups == group) & probes.across
    if sizes[group] < _FEWEST_OF_A_STUDY or mine.sum() < _FEWEST_PROBES:
        return None
    return _quarter(probes.known[mine] / scales[probes.known_nearest[mine]], probes.weight[mine])


def _quarter(values: Distances, weight: Distances) -> float:
    return float(np.quantile(values, _QUARTER, weights=weight, method="inverted_cdf"))


def _usual(ratios: dict[int, float]) -> float:
    """90 % quantile of the studies' ratios; NaN for fewer than two studies."""
    return float(np.quantile(list(ratios.values()), _USUAL, method="higher")) if len(ratios) > 1 else float("nan")


def _best_distance(probes: _Probes) -> float:
    """The threshold, computed from uncorrected distances."""
    missing = ~np.isnan(probes.missing)
    if not missing.any():
        return max(float(np.quantile(probes.known, 0.99)), _LEAST_DISTANCE)
    levels = np.quantile(np.concatenate([probes.known, probes.missing[missing]]), np.linspace(0, 1, 501))
    candidates = np.append((levels[1:] + levels[:-1]) / 2, levels[-1])  # thresholds in the middle of gaps
    kept = _share_above(probes.known, probes.labels, candidates)
    found = _share_above(probes.missing[missing], probes.labels[missing], candidates)
    score = np.where(1 - kept >= _LEAST_KEPT, found - kept, -np.inf)
    best = np.flatnonzero(score == score.max())
    return max(float(candidates[best[len(best) // 2]]), _LEAST_DISTANCE)


def _share_above(values: Distances, labels: Codes, candidates: Distances) -> Distances:
    """Share of the values above each candidate, mean over labels."""
    shares = [(values[labels == label][:, None] > candidates).mean(axis=0) for label in np.unique(labels)]
    return np.asarray(np.mean(shares, axis=0))


def _as_applied(probes: _Probes, threshold: float, scales: Distances, ratios: dict[int, float]) -> tuple[float, float]:
    """`known_kept` and `left_out_found`: each study is the query, once with all labels and once per missing label."""
    kept: dict[int, list[npt.NDArray[np.bool_]]] = {}
    found: dict[int, list[npt.NDArray[np.bool_]]] = {}
    known, missing = probes.known / scales[probes.known_nearest], probes.missing / scales[probes.missing_nearest]
    for group in np.unique(probes.groups):
        usual = _usual({other: ratio for other, ratio in ratios.items() if other != group})
        corrected = group in ratios  # small studies are not corrected
        mine = probes.groups == group
        others = mine & probes.across if (mine & probes.across).any() else mine
        divisor = _divisor(known[others], probes.weight[others], usual) if corrected else 1.0
        for label in np.unique(probes.labels[mine]):
            of_label = mine & (probes.labels == label)
            kept.setdefault(label, []).append(probes.known[of_label & others] / divisor <= threshold)
            rest, lacking = others & ~of_label, of_label & ~np.isnan(probes.missing)
            values = np.append(known[rest], missing[lacking])
            weight = np.append(probes.weight[rest], probes.weight[lacking])
            by = _divisor(values, weight, usual) if corrected and len(values) else 1.0
            found.setdefault(label, []).append(probes.missing[lacking] / by > threshold)
    return _mean_over_labels(kept), _mean_over_labels(found)


def _divisor(relative: Distances, weight: Distances, usual: float) -> float:
    return _correct(_quarter(relative, weight), usual).divisor


def _mean_over_labels(parts: dict[int, list[npt.NDArray[np.bool_]]]) -> float:
    """Share of true values, mean over labels; NaN if there are no cells."""
    cells = [np.concatenate(values) for values in parts.values()]
    shares = [values.mean() for values in cells if len(values)]
    return float(np.mean(shares)) if shares else float("nan")
