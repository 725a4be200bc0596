"""Quality gates of an embedding before publication: functions from arrays to value, limit and verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
# Gates of an embedding that is published without its model: those that are measured, and those that need the model.
WITHOUT_MODEL = ("cells", "finite", "variance", "duplicate_dimensions", "effective_rank", "order")
NOT_APPLICABLE = (
    "genes", "counts", "architecture", "convergence", "overfitting", "re_embedding", "active_units",
    "cell_type_separation", "batch_mixing",
)  # fmt: skip
NO_MODEL = "not applicable: no model given"
# Minimum number of measured epochs to estimate the fall of the ELBO.
_FEWEST_EPOCHS = 5


@dataclass(frozen=True)
class Gate:
    """One measured property.

    Attributes
    ----------
    name
        Name of the property, as in the config's `gates.waived`.
    value
        The measured value.
    side, bound
        The value must be `at most` or `at least` this limit.
    stops
        Whether a failure stops publishing; otherwise it is a warning.
    detail
        The finding in words.
    """

    name: str
    value: float
    side: Literal["at most", "at least"]
    bound: float
    detail: str
    stops: bool = True

    @property
    def passed(self) -> bool:
        """The verdict; NaN fails."""
        return self.value <= self.bound if self.side == "at most" else self.value >= self.bound

    def record(self) -> dict[str, Any]:
        """Entry of `qa.json`; a value that is not finite is null."""
        return {**asdict(self), "value": self.value if math.isfinite(self.value) else None, "passed": self.passed}


def same_cells(expected: npt.NDArray[np.int64], found: npt.NDArray[np.int64]) -> Gate:
    """The embedding has every cell of the query exactly once, in the order of the query.

    Parameters
    ----------
    expected, found
        int64 (cells,): soma_joinids of the query, ascending, and of the embedding's rows.
    """
    distinct, times = np.unique(found, return_counts=True)
    missing, additional = np.setdiff1d(expected, distinct), np.setdiff1d(distinct, expected)
    twice = distinct[times > 1]
    moved = 0
    if not (len(missing) + len(additional) + len(twice)):
        moved = int((expected != found).sum())
    findings = {"missing": missing, "not of the query": additional, "twice or more": twice}
    words = [f"{len(ids):,} {name} (the first: {ids[0]})" for name, ids in findings.items() if len(ids)]
    words += [f"{moved:,} in another order"] if moved else []
    detail = ", ".join(words) or f"{len(found):,} cells, each once, in the order of the Census"
    return Gate("cells", len(missing) + len(additional) + len(twice) + moved, "at most", 0, detail)


class LatentMoments:
    """First and second moments of an embedding, accumulated block by block in float64.

    Parameters
    ----------
    n_latent
        Number of dimensions.
    """

    def __init__(self, n_latent: int) -> None:
        self.n_cells = 0
        self.not_finite = 0
        self.first_not_finite: int | None = None
        self._sum = np.zeros(n_latent)
        self._products = np.zeros((n_latent, n_latent))
        self._origin: Floats | None = None  # subtracted before squaring, to avoid cancellation

    def add(self, mean: Floats) -> None:
        """Add cells: posterior means, (cells, n_latent)."""
        finite = np.isfinite(mean).all(axis=1)
        if not finite.all():
            self.not_finite += int((~finite).sum())
            if self.first_not_finite is None:
                self.first_not_finite = self.n_cells + int(np.argmin(finite))
        self.n_cells += len(mean)
        mean = np.asarray(mean[finite], np.float64)
        if not len(mean):
            return
        if self._origin is None:
            self._origin = mean.mean(axis=0)
        centred = mean - self._origin
        self._sum += centred.sum(axis=0)
        self._products += centred.T @ centred

    @property
    def covariance(self) -> npt.NDArray[np.float64]:
        """Covariance of the posterior means over cells, float64 (n_latent, n_latent)."""
        n_cells = max(self.n_cells - self.not_finite, 1)
        return self._products / n_cells - np.outer(self._sum, self._sum) / n_cells**2


def finite(moments: LatentMoments) -> Gate:
    """The embedding has no NaN and no infinity."""
    detail = f"all {moments.n_cells:,} cells"
    if moments.not_finite:
        detail = f"{moments.not_finite:,} cells are not finite, the first in row {moments.first_not_finite:,}"
    return Gate("finite", moments.not_finite, "at most", 0, detail)


def variance(moments: LatentMoments, bound: float) -> Gate:
    """Every dimension varies between cells: smallest variance of the posterior means."""
    variances = moments.covariance.diagonal()
    least = int(variances.argmin())
    return Gate("variance", float(variances[least]), "at least", bound, f"least in dimension {least}")


def active_units(variance: Floats, bound: float) -> Gate:
    """Share of active dimensions: those whose posterior is narrower than the prior (variance 1).

    Parameters
    ----------
    variance
        (cells, n_latent): posterior variances of a sample of cells.
    bound
        Minimum share of active dimensions.
    """
    active = variance.mean(axis=0) < _ACTIVE_BELOW
    return Gate("active_units", float(active.mean()), "at least", bound, f"{active.sum()} of {len(active)} dimensions")


_ACTIVE_BELOW = 0.9


def duplicate_dimensions(moments: LatentMoments, bound: float) -> Gate:
    """No dimension repeats another: largest absolute correlation of two used dimensions."""
    covariance = moments.covariance
    used = np.flatnonzero(covariance.diagonal() > _USED_ABOVE)
    if len(used) < 2:
        return Gate("duplicate_dimensions", 0.0, "at most", bound, f"{len(used)} dimensions vary")
    scale = np.sqrt(covariance.diagonal()[used])
    correlation = np.abs(covariance[np.ix_(used, used)] / np.outer(scale, scale))
    np.fill_diagonal(correlation, 0.0)
    one, other = np.unravel_index(correlation.argmax(), correlation.shape)
    detail = f"largest between dimensions {used[min(one, other)]} and {used[max(one, other)]}, of {len(used)} that vary"
    return Gate("duplicate_dimensions", float(correlation[one, other]), "at most", bound, detail)


# A dimension counts as used above this variance of the posterior means (Burda et al. 2016). Unused dimensions can
# correlate with used ones by chance.
_USED_ABOVE = 0.01


def effective_rank(moments: LatentMoments, bound: float) -> Gate:
    """Effective rank (Roy & Vetterli 2007): exp of the entropy of the covariance's eigenvalues."""
    eigenvalues = np.clip(np.linalg.eigvalsh(moments.covariance), 0.0, None)
    shares = eigenvalues / max(eigenvalues.sum(), np.finfo(float).tiny)
    entropy = -float((shares * np.log(np.clip(shares, np.finfo(float).tiny, None))).sum())
    return Gate("effective_rank", math.exp(entropy), "at least", bound, f"of {len(eigenvalues)} dimensions")


def gene_coverage(found: npt.NDArray[np.bool_], counts: Floats, bound: float) -> list[Gate]:
    """Share of the model's genes that the Census has, and share of the training cells' counts in these genes.

    Parameters
    ----------
    found
        Bool (genes,): whether the Census has the gene.
    counts
        (genes,): sum of the counts of each gene over training cells, or over a sample of them.
    bound
        Minimum of both shares: `genes.min_share`.
    """
    detail = f"{int(found.sum()):,} of {len(found):,} genes of the model are in the Census"
    of_counts = float(counts[found].sum() / max(counts.sum(), 1.0))
    return [
        Gate("genes", float(found.mean()), "at least", bound, detail),
        Gate("counts", of_counts, "at least", bound, "of the training cells' counts are in these genes"),
    ]


def re_embedding(joinids: npt.NDArray[np.int64], published: Floats, recomputed: Floats, bound: float) -> Gate:
    """The published embedding equals the one that scvi-tools computes from counts read again from the Census.

    Parameters
    ----------
    joinids
        int64 (cells,): the sampled cells.
    published, recomputed
        (cells, n_latent): the published embedding, and the one by scvi-tools.
    bound
        Maximum absolute difference.
    """
    differences = np.abs(published.astype(np.float64) - recomputed).max(axis=1)
    differences[np.isnan(differences)] = np.inf
    worst = int(differences.argmax())
    wrong = int((~(differences <= bound)).sum())
    detail = f"{len(joinids):,} cells read again"
    if wrong:
        detail = f"{wrong:,} of {detail} differ, most of all the cell with soma_joinid {joinids[worst]}"
    return Gate("re_embedding", float(differences[worst]), "at most", bound, detail)


def order(hashes: npt.NDArray[np.uint64], latent: Floats, joinids: npt.NDArray[np.int64], bound: float) -> Gate:
    """Cells with equal counts (copies) have equal embeddings.

    Parameters
    ----------
    hashes
        uint64 (cells,): hash of each cell's counts in the model's genes.
    latent
        (cells, n_latent): the embedding. It may be a memory map: only rows of copies are read.
    joinids
        int64 (cells,): soma_joinids, for the report.
    bound
        Maximum absolute difference.
    """
    by_hash = np.argsort(hashes, kind="stable")
    ordered = hashes[by_hash]
    same = ordered[1:] == ordered[:-1]
    copies, originals = by_hash[1:][same], by_hash[:-1][same]
    largest, worst, wrong = 0.0, 0, 0
    for start in range(0, len(copies), _ROWS):
        some = slice(start, start + _ROWS)
        differences = np.abs(np.asarray(latent[copies[some]], np.float64) - latent[originals[some]]).max(axis=1)
        differences[np.isnan(differences)] = np.inf
        wrong += int((~(differences <= bound)).sum())
        if differences.max() > largest:
            largest, worst = float(differences.max()), start + int(differences.argmax())
    detail = f"{len(copies):,} pairs of cells with equal counts"
    if wrong:
        pair = f"{joinids[originals[worst]]} and {joinids[copies[worst]]}"
        detail = f"{wrong:,} of {detail} have different embeddings, most of all soma_joinids {pair}"
    return Gate("order", largest, "at most", bound, detail)


_ROWS = 2**16


def architecture(expected: dict[str, Any], found: dict[str, Any]) -> Gate:
    """The built module is the one that the config asks for.

    Parameters
    ----------
    expected, found
        Layer widths, number of parameters, gene list and other properties, by name.
    """
    differing = [name for name in expected | found if expected.get(name) != found.get(name)]
    words = [f"{name} is {_short(found.get(name))}, expected {_short(expected.get(name))}" for name in differing]
    detail = "; ".join(words) or ", ".join(f"{name} {_short(value)}" for name, value in expected.items())
    return Gate("architecture", len(differing), "at most", 0, detail)


def _short(value: Any) -> str:
    many = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > _SHOWN
    return f"{len(value):,} items" if many else f"{value}"


_SHOWN = 4


def training_gates(curves: dict[str, list[float]], most_fall: float, most_gap: float) -> list[Gate]:
    """Check convergence: the ELBO no longer falls, and is similar for training and validation cells.

    Parameters
    ----------
    curves
        Metrics per epoch: `elbo_train` and, if there are validation cells, `elbo_validation`. Values of epochs without
        validation are not finite.
    most_fall
        Maximum relative fall of the ELBO over the last fifth of the epochs.
    most_gap
        Maximum relative excess of the validation ELBO (a loss) over the training ELBO.

    Returns
    -------
    `convergence` and `overfitting`. Each alone is a warning: after a short training on very many cells the ELBO still
    falls, and a small training set always fits better than other cells. Both together stop publishing: the model
    overfits before it has converged.
    """
    validated = "elbo_validation" in curves
    curve = np.asarray(curves.get("elbo_validation", curves.get("elbo_train", [])), np.float64)
    epochs = np.flatnonzero(np.isfinite(curve))
    fifth = len(curve) / 5
    last = epochs[-max(3, math.ceil(len(epochs) / 5)) :]
    name = "elbo_validation" if validated else "elbo_train"
    if len(epochs) < _FEWEST_EPOCHS:
        fall, words = math.nan, f"{len(epochs)} measured epochs are too few to judge"
    else:
        slope = np.polyfit(last, curve[last], 1)[0]
        fall = float(-slope * fifth / abs(curve[last[-1]]))
        words = f"decrease of {name} over the last fifth of {len(curve)} epochs, now {curve[last[-1]]:.1f}"
    convergence = Gate("convergence", fall, "at most", most_fall, words, stops=False)
    if not validated or not len(epochs):
        return [convergence]
    train, validation = curves["elbo_train"][epochs[-1]], float(curve[epochs[-1]])
    gap = (validation - train) / abs(validation)
    words = f"elbo_train {train:.1f}, elbo_validation {validation:.1f}"
    stops = fall > most_fall and not gap <= most_gap
    return [convergence, Gate("overfitting", gap, "at most", most_gap, words, stops=stops)]


def stopped_by(gates: Iterable[Gate], waived: dict[str, str]) -> list[Gate]:
    """Gates that stop publishing: failed, more than a warning, and not waived."""
    return [gate for gate in gates if gate.stops and not gate.passed and gate.name not in waived]


def broken_verdicts(record: dict[str, Any], names: Iterable[str], max_difference: float) -> list[str]:
    """Problems in a published record of gates: missing gates, wrong verdicts, failures without waiver; one line each.

    Parameters
    ----------
    record
        Content of `qa.json`.
    names
        Gates that every record must contain.
    max_difference
        Our own limit for differences; a larger limit in the record is ignored.
    """
    found = {gate["name"]: gate for gate in record["gates"]}
    lines = [f"{name} is missing" for name in names if name not in found]
    for name, gate in found.items():
        bound = min(gate["bound"], max_difference) if name in ("re_embedding", "order") else gate["bound"]
        value = math.nan if gate["value"] is None else gate["value"]
        holds = Gate(name, value, gate["side"], bound, gate["detail"]).passed
        if gate["passed"] and not holds:
            lines.append(f"{name} is recorded as passed, but {value:.3g} is not {gate['side']} {bound:.3g}")
        elif not gate["passed"] and "waived" not in gate and (gate["stops"] or name in names):
            lines.append(f"{name} did not pass")
    return lines
