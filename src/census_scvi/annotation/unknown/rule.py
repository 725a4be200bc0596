"""Cells of types that the reference lacks: a score from distances, its threshold, and the measured quality of both.

The score of a cell is the log of its distance to the nearest type, relative to the distances within this type, mean
over the embeddings of the method and two distances: to the nearest cells of a type, and to its mean (Mahalanobis). Each
is scaled so that held-out reference cells have median 0 and a 95 % quantile of 1. The cells of a batch to which all
annotators give one label with high probability show how much farther than the reference all cells of the batch are.
This shift is subtracted, up to 1 unless random cells are held out, which differ less than studies. A cell is judged by
the median over the query cells around it.

The threshold is set on held-out studies of the reference, each annotated from the others, with and without each type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from census_scvi.annotation.protocol import batch_in_words
from census_scvi.annotation.unknown.type_distances import TypeDistances
from census_scvi.neighbors.index import NeighborIndex

# Query cells around a cell whose median counts: at most this number, and of a small query this share.
_AROUND, _SHARE_AROUND, _FEWEST_AROUND = 100, 0.02, 4
# Probability above which a label is certain, and the fewest such cells that show a shift; the largest shift.
_CERTAIN, _FEWEST_CERTAIN, _LARGEST_SHIFT = 0.9, 10, 1.0
# A batch is far if its share of agreed cells is below this part of the held-out cells' share, or if more than half of
# its cells are beyond the 95 % quantile.
_LEAST_AGREED, _MOST_BEYOND = 0.6, 0.5
# Least share of held-out cells of known types that keep their label at the threshold.
_LEAST_KEPT = 0.95
# Quantile of the scores of single held-out cells that the threshold must not exceed, with one held-out part and with
# several: types of the reference that differ much would be found at a threshold that is too high for others.
_MOST_QUANTILE = (0.9, 0.8)
# Held-out cells per study, excluded types per study (the most frequent), and fewest cells of an excluded type.
_MOST_CELLS, _MOST_TYPES, _FEWEST_CELLS = 2_000, 10, 10
# Share of an excluded type in the study, where it is tested as a frequent type.
_FREQUENT = 0.6
_CANDIDATES = 200

Rows = npt.NDArray[np.int64]
Scores = dict[str, npt.NDArray[np.float64]]
Spaces = Mapping[str, npt.NDArray[np.float32]]
Probabilities = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class HeldOutCells:
    """Cells of a held-out part of the reference, annotated from the other parts.

    Attributes
    ----------
    train, codes
        int64 (training cells,): rows and types of the other parts.
    test, truth
        int64 (cells,): rows and types of the held-out cells, all of types among the training cells.
    probability
        By annotator, float32 (cells, types).
    without
        Function of a type: `probability`, if the training cells of this type are excluded.
    """

    train: Rows
    codes: Rows
    test: Rows
    truth: Rows
    probability: Probabilities
    without: Callable[[int], Probabilities]


@dataclass(frozen=True)
class UnknownRule:
    """How cells of missing types are recognised, and how well on held-out reference cells.

    Attributes
    ----------
    scales
        By embedding and distance: median and 95 % quantile of the scores of held-out cells.
    threshold
        Score above which a cell is unknown.
    known_kept
        Share of held-out cells of known types that are not unknown, mean over types; NaN without held-out cells.
    left_out_found
        Share of cells of an excluded type that are unknown, mean over types; NaN if no type could be excluded.
    frequent_found
        The same, if the excluded type is 60 % of the cells.
    found_by_type
        `left_out_found` of each type that was excluded, by code.
    agreed
        Share of the held-out cells to which all annotators give one label with a probability above 0.9; NaN without
        held-out cells.
    limited
        Whether the shift of a batch is at most 1.
    """

    scales: dict[str, tuple[float, float]]
    threshold: float
    known_kept: float
    left_out_found: float
    frequent_found: float
    found_by_type: dict[int, float] = field(default_factory=dict)
    agreed: float = float("nan")
    limited: bool = True


@dataclass(frozen=True)
class Batch:
    """State of a batch of the query.

    Attributes
    ----------
    cells
        Number of its cells.
    agreed
        Share of them to which all annotators give one label with a probability above 0.9.
    expected_agreed
        The same share of the held-out cells; NaN without such cells.
    beyond
        Share of them with a score, before any shift, beyond the 95 % quantile of held-out cells.
    shift
        The subtracted shift, mean over embeddings and distances.
    """

    cells: int
    agreed: float
    expected_agreed: float
    beyond: float
    shift: float

    @property
    def far(self) -> bool:
        """Whether most cells may be of types that the reference lacks, or of very different samples."""
        return self.agreed < _LEAST_AGREED * self.expected_agreed or self.beyond > _MOST_BEYOND

    def warning(self, name: str) -> str:
        """What to tell the user of a batch that is `far`."""
        return (
            f"{batch_in_words(name)}: {self.agreed:.0%} of {self.cells:,} cells have a certain label (held-out cells:"
            f" {self.expected_agreed:.0%}), and {self.beyond:.0%} are farther from the labelled cells than 95 % of the"
            " held-out cells; many may be of types that the reference lacks: check their labels with marker genes"
        )


def agree(probability: Probabilities) -> npt.NDArray[np.bool_]:
    """Cells to which all annotators give the same label with high probability, bool (cells,)."""
    labels = np.stack([each.argmax(axis=1) for each in probability.values()])
    least = np.min([each.max(axis=1) for each in probability.values()], axis=0)
    certain: npt.NDArray[np.bool_] = (labels == labels[0]).all(axis=0) & (least > _CERTAIN)
    return certain


def set_rule(
    spaces: Spaces,
    held_out: list[HeldOutCells],
    reference: Rows,
    codes: Rows,
    n_classes: int,
    seed: int,
    *,
    limited: bool = True,
) -> UnknownRule:
    """The rule for a query.

    Parameters
    ----------
    spaces
        Embeddings of all cells by name; the first one says which cells are around a cell.
    held_out
        Held-out parts of the reference.
    reference, codes, n_classes
        Rows and types of all reference cells; used for the scales if nothing is held out.
    seed
        Seed of the choice of cells.
    limited
        Whether the shift of a batch is at most 1: held-out cells are of other studies, donors or batches.
    """
    numbers = np.random.default_rng(seed)
    parts = [_sampled(part, numbers) for part in held_out]
    if not parts:
        order, scores = _within(spaces, reference, codes, n_classes)
        scales = {name: _scale(values, codes[order]) for name, values in scores.items()}
        return UnknownRule(scales, 1.0, float("nan"), float("nan"), float("nan"), limited=False)
    studies = [_Study(spaces, part, n_classes) for part in parts]
    truth = np.concatenate([study.part.truth for study in studies])
    held = [study.scores() for study in studies]
    scales = {name: _scale(np.concatenate([scores[name] for scores in held]), truth) for name in held[0]}
    known = [study.known(scales) for study in studies]
    single = np.concatenate([_mean_score(_scaled(scores, scales)) for scores in held])
    most = _quantile(single, truth, _MOST_QUANTILE[len(studies) > 1])
    rare, frequent = (_excluded(studies, scales, share, numbers) for share in (None, _FREQUENT))
    threshold = min(_best_threshold(np.concatenate(known), rare, frequent), most)
    by_type = {code: float((values > threshold).mean()) for code, values in rare.items()}
    return UnknownRule(
        scales,
        threshold,
        _mean_over_types(np.concatenate(known) <= threshold, truth),
        _mean(list(by_type.values())),
        _mean([float((values > threshold).mean()) for values in frequent.values()]),
        by_type,
        float(np.concatenate([agree(part.probability) for part in parts]).mean()),
        limited,
    )


def apply_rule(
    rule: UnknownRule,
    spaces: Spaces,
    reference: Rows,
    codes: Rows,
    n_classes: int,
    query: Rows,
    batch: npt.NDArray[np.object_],
    agreed: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.float64], dict[str, Batch]]:
    """Scores of the query's cells, float64 (cells,), and the state of each batch.

    Parameters
    ----------
    rule
        Result of `set_rule` with the same embeddings.
    spaces, reference, codes, n_classes
        As in `set_rule`.
    query
        int64 (cells,): rows of the query's cells.
    batch, agreed
        (cells,): batch of each query cell, and whether the annotators agree on it.
    """
    raw = _scaled(_scores(_distances(spaces, reference, codes, n_classes, query)), rule.scales)
    total = _mean_score(raw)
    shifted, batches = {name: values.copy() for name, values in raw.items()}, {}
    for name in np.unique(batch.astype(str)):
        mine = batch.astype(str) == name
        shifts = [_subtract_shift(values, mine, agreed, limited=rule.limited) for values in shifted.values()]
        batches[str(name)] = Batch(
            int(mine.sum()),
            float(agreed[mine].mean()),
            rule.agreed,
            float((total[mine] > 1).mean()),
            float(np.mean(shifts)),
        )
    return _median_around(_mean_score(shifted), _cells_around(next(iter(spaces.values()))[query])), batches


class _Study:
    """A held-out part, as if it were the query."""

    def __init__(self, spaces: Spaces, part: HeldOutCells, n_classes: int) -> None:
        self.part, self._space = part, next(iter(spaces.values()))[part.test]
        self._around = _cells_around(self._space)  # for every type that is excluded
        self._distances = _distances(spaces, part.train, part.codes, n_classes, part.test)

    def scores(self, without: int | None = None) -> Scores:
        return _scores(self._distances, without)

    def known(self, scales: dict[str, tuple[float, float]]) -> npt.NDArray[np.float64]:
        """Scores as applied to a query, of all cells."""
        return self._applied(self.scores(), scales, agree(self.part.probability), np.ones(len(self.part.test), bool))

    def excluded(
        self, scales: dict[str, tuple[float, float]], code: int, share: float | None, numbers: np.random.Generator
    ) -> npt.NDArray[np.float64]:
        """Scores as applied, of the cells of a type that the training cells lack; with `share`, it is that frequent."""
        mine = self.part.truth == code
        kept = np.ones(len(mine), bool)
        if share is not None:
            others = np.flatnonzero(~mine)
            n_kept = min(round(mine.sum() * (1 - share) / share), len(others))
            kept[others] = False
            kept[numbers.choice(others, n_kept, replace=False)] = True
        found = self._applied(self.scores(code), scales, agree(self.part.without(code)), kept)
        return found[mine[kept]]

    def _applied(
        self,
        scores: Scores,
        scales: dict[str, tuple[float, float]],
        agreed: npt.NDArray[np.bool_],
        kept: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.float64]:
        scaled = {name: values[kept] for name, values in _scaled(scores, scales).items()}
        for values in scaled.values():
            _subtract_shift(values, np.ones(len(values), bool), agreed[kept])
        around = self._around if kept.all() else _cells_around(self._space[kept])
        return _median_around(_mean_score(scaled), around)


def _sampled(part: HeldOutCells, numbers: np.random.Generator) -> HeldOutCells:
    """The part with at most 2,000 of its cells."""
    if len(part.test) <= _MOST_CELLS:
        return part
    rows = np.sort(numbers.choice(len(part.test), _MOST_CELLS, replace=False))

    def without(code: int) -> Probabilities:
        return {name: values[rows] for name, values in part.without(code).items()}

    probability = {name: values[rows] for name, values in part.probability.items()}
    return HeldOutCells(part.train, part.codes, part.test[rows], part.truth[rows], probability, without)


def _excluded(
    studies: list[_Study], scales: dict[str, tuple[float, float]], share: float | None, numbers: np.random.Generator
) -> dict[int, npt.NDArray[np.float64]]:
    """Scores of the cells of each excluded type, by type."""
    found: dict[int, list[npt.NDArray[np.float64]]] = {}
    for study in studies:
        sizes = np.bincount(study.part.truth)
        if len(np.unique(study.part.codes)) < 3:
            continue  # one type would be left
        for code in np.argsort(-sizes, kind="stable")[:_MOST_TYPES]:
            if sizes[code] >= _FEWEST_CELLS:
                found.setdefault(int(code), []).append(study.excluded(scales, int(code), share, numbers))
    return {code: np.concatenate(parts) for code, parts in found.items()}


def _best_threshold(
    known: npt.NDArray[np.float64],
    rare: dict[int, npt.NDArray[np.float64]],
    frequent: dict[int, npt.NDArray[np.float64]],
) -> float:
    """The threshold with the largest sum of kept and found shares, of those that keep most known cells."""
    levels = np.unique(np.quantile(known, np.linspace(0.5, 1, _CANDIDATES)))
    kept = np.array([(known <= level).mean() for level in levels])
    found = np.zeros(len(levels))
    for tested in (rare, frequent):
        if tested:
            found += [_mean([float((values > level).mean()) for values in tested.values()]) for level in levels]
    score = np.where(kept >= _LEAST_KEPT, kept + found / 2, -np.inf)
    return float(levels[score.argmax()])


def _distances(spaces: Spaces, train: Rows, codes: Rows, n_classes: int, test: Rows) -> dict[str, TypeDistances]:
    """Both distances in each embedding."""
    found = {}
    for name, space in spaces.items():
        found[f"{name}, nearest"] = TypeDistances.to_nearest(space, train, codes, n_classes, test)
        found[f"{name}, means"] = TypeDistances.to_means(space, train, codes, n_classes, test)
    return found


def _within(spaces: Spaces, rows: Rows, codes: Rows, n_classes: int) -> tuple[Rows, Scores]:
    """Scores of half of the cells by the other half, as no cell is its own neighbor; first the order of the cells."""
    even = np.arange(len(rows)) % 2 == 0
    parts = []
    for half in (even, ~even):
        others = ~half if len(np.unique(codes[~half])) == len(np.unique(codes)) else np.ones(len(rows), bool)
        parts.append(_scores(_distances(spaces, rows[others], codes[others], n_classes, rows[half])))
    order = np.concatenate([np.flatnonzero(even), np.flatnonzero(~even)])
    return order, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _scores(distances: Mapping[str, TypeDistances], without: int | None = None) -> Scores:
    return {name: each.score(without) for name, each in distances.items()}


def _mean_score(scores: Scores) -> npt.NDArray[np.float64]:
    return np.asarray(np.mean(list(scores.values()), axis=0))


def _scale(values: npt.NDArray[np.float64], codes: Rows) -> tuple[float, float]:
    """Median and 95 % quantile; every type has the same weight."""
    median, high = (_quantile(values, codes, share) for share in (0.5, 0.95))
    return median, max(high, median + 1e-6)


def _quantile(values: npt.NDArray[np.float64], codes: Rows, share: float) -> float:
    """Quantile of values; every type has the same weight."""
    return float(np.quantile(values, share, weights=1 / np.bincount(codes)[codes], method="inverted_cdf"))


def _scaled(scores: Scores, scales: dict[str, tuple[float, float]]) -> Scores:
    return {name: (values - scales[name][0]) / (scales[name][1] - scales[name][0]) for name, values in scores.items()}


def _subtract_shift(
    values: npt.NDArray[np.float64], mine: npt.NDArray[np.bool_], agreed: npt.NDArray[np.bool_], *, limited: bool = True
) -> float:
    """Subtract, in place, the median of the cells on which the annotators agree: 0 or more, at most 1 if limited."""
    certain = mine & agreed
    if certain.sum() < _FEWEST_CERTAIN:
        return 0.0
    shift = float(np.clip(np.median(values[certain]), 0, _LARGEST_SHIFT if limited else None))
    values[mine] -= shift
    return shift


def _cells_around(points: npt.NDArray[np.float32]) -> Rows:
    """Positions of each cell and the cells around it, int64 (cells, cells around it)."""
    if not len(points):
        return np.empty((0, 1), np.int64)
    n_around = min(_AROUND, max(int(_SHARE_AROUND * len(points)), _FEWEST_AROUND))
    return np.asarray(NeighborIndex(points).query(points, n_around + 1)[1], np.int64)


def _median_around(values: npt.NDArray[np.float64], around: Rows) -> npt.NDArray[np.float64]:
    """Median over the cell and the cells around it."""
    return np.asarray(np.median(values[around], axis=1))


def _mean_over_types(kept: npt.NDArray[np.bool_], truth: Rows) -> float:
    return _mean([float(kept[truth == code].mean()) for code in np.unique(truth)])


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
