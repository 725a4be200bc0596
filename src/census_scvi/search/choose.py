"""Score of a trial, the best settings, and the choice between them by the spread of their seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from census_scvi.search.space import Settings, Tried
from census_scvi.search.trials import FINISHED, SEARCHED, STOPPED, Trial

# Settings that are trained with further seeds, besides the default.
N_BEST = 2


def measures_of(trial: Trial) -> dict[str, float | None]:
    """`elbo`, `reconstruction` and `kl` of the validation cells in the last epoch, `bio` and `batch`; None: unknown."""
    curves, measured = trial.curves, trial.measured
    found: dict[str, float | None] = {
        name: curves[curve][-1] if curves.get(curve) else None
        for name, curve in (
            ("elbo", "elbo_validation"),
            ("reconstruction", "reconstruction_loss_validation"),
            ("kl", "kl_local_validation"),
        )
    }
    return found | {name: measured.get(name) for name in ("bio", "batch")}


def score_of(trial: Trial, weights: Mapping[str, float]) -> float | None:
    """The declared metric of a finished trial, higher is better; None if a part of it is unknown.

    The ELBO of scvi-tools is a loss (lower is better), therefore its sign is changed.
    """
    values = measures_of(trial)
    parts = [(weight, values[name], -1.0 if name == "elbo" else 1.0) for name, weight in weights.items()]
    if trial.status != FINISHED or any(value is None or not math.isfinite(value) for _, value, _ in parts):
        return None
    return sum(weight * sign * value for weight, value, sign in parts if value is not None)


def tried_of(trials: Sequence[Trial], weights: Mapping[str, float]) -> list[Tried]:
    """The settings of the search, in order, with the mean score over their seeds."""
    found = []
    for settings in distinct([trial.settings for trial in trials if trial.part == SEARCHED]):
        mine = [trial for trial in trials if trial.part == SEARCHED and trial.settings == settings]
        scores = [score_of(trial, weights) for trial in mine]
        known = [score for score in scores if score is not None]
        intermediate = {}
        if any(trial.status == STOPPED for trial in mine):
            curves = [trial.curves.get("elbo_validation", []) for trial in mine if trial.status == STOPPED]
            intermediate = {epoch: -loss for epoch, loss in enumerate(curves[0]) if math.isfinite(loss)}
        found.append(Tried(settings, fmean(known) if len(known) == len(scores) else None, intermediate))
    return found


def distinct(settings: Sequence[Settings]) -> list[Settings]:
    """Different settings, in order of first occurrence."""
    found: list[Settings] = []
    for each in settings:
        if each not in found:
            found.append(each)
    return found


def finalists(tried: Sequence[Tried], default: Settings | None) -> list[Settings]:
    """The best settings of the search and the default, which are trained with further seeds.

    Parameters
    ----------
    tried
        The settings of the search.
    default
        The default as settings of the search, or {} if the space does not contain it.
    """
    ranked = sorted((each for each in tried if each.score is not None), key=lambda each: -(each.score or 0.0))
    best = [each.settings for each in ranked[:N_BEST]]
    return distinct([*best, default if default is not None else {}])


@dataclass(frozen=True)
class Finalist:
    """Settings that were trained with further seeds.

    Attributes
    ----------
    settings
        Value by dotted name; empty for the default.
    scores
        Score of each seed, higher is better.
    parameters, epochs
        Size of the model, and epochs of its training: what makes one simpler than another.
    changed
        Number of settings that differ from the default.
    """

    settings: Settings
    scores: tuple[float, ...]
    parameters: int
    epochs: int
    changed: int

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.scores)

    @property
    def simplicity(self) -> tuple[Any, ...]:
        """Sorts the simplest first: fewest parameters, then epochs, then settings that differ from the default."""
        return self.parameters, self.epochs, self.changed, -self.mean


@dataclass(frozen=True)
class Choice:
    """The chosen settings, and the sentence that says why."""

    winner: Finalist
    sentence: str


def choose(found: Sequence[Finalist], weights: Mapping[str, float]) -> Choice:
    """Choose the best settings if their worst seed beats every seed of the others; else the simplest of the equal ones.

    Parameters
    ----------
    found
        One or more finalists.
    weights
        The metric: weight of each part.
    """
    best, *others = sorted(found, key=lambda each: -each.mean)
    words = _Words(weights)
    chosen = f"Chosen: {_name(best)}. "
    if not others:
        return Choice(best, f"{chosen}No other settings were trained with all seeds.")
    equal = [other for other in others if max(other.scores) >= min(best.scores)]
    second = (equal or others)[0]
    if not equal:
        return Choice(
            best,
            f"{chosen}Its mean {words.metric} over {len(best.scores)} seeds is {words.of(best)}, and its worst seed is"
            f" better than the best seed of the runner-up ({_name(second)}): {words.of(second)}.",
        )
    simplest = min([best, *equal], key=lambda each: each.simplicity)
    if simplest is best:
        return Choice(
            best,
            f"{chosen}Its mean {words.metric} is the best, {words.of(best)}. The seeds do not separate it from"
            f" {_name(second)} ({words.of(second)}), which is not simpler: {_size(second)}, compared with"
            f" {_size(best)}.",
        )
    return Choice(
        simplest,
        f"Chosen: {_name(simplest)}, the simplest of {1 + len(equal)} that the seeds do not separate. Its"
        f" mean {words.metric} is {words.of(simplest)}, with {_size(simplest)}; the best mean is that of"
        f" {_name(best)}, {words.of(best)}, with {_size(best)}.",
    )


def _name(finalist: Finalist) -> str:
    default = " (the default)" if finalist.settings and not finalist.changed else ""
    return words_of(finalist.settings) + default


def words_of(settings: Settings) -> str:
    """Settings in words."""
    return ", ".join(f"{name} {_value(value)}" for name, value in settings.items()) or "the default"


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def metric_words(weights: Mapping[str, float]) -> str:
    """The metric in words."""
    if len(weights) == 1:
        return {"elbo": "validation ELBO", "bio": "bio score", "batch": "batch score"}[next(iter(weights))]
    return "score (" + " + ".join(f"{weight:g} {name}" for name, weight in weights.items()) + ")"


class _Words:
    """Numbers of a metric in words; an ELBO is shown as scvi-tools reports it, lower is better."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.metric = metric_words(weights)
        self._sign = -1.0 if list(weights) == ["elbo"] else 1.0

    def of(self, finalist: Finalist) -> str:
        """Mean and range."""
        low, high = sorted(self._sign * score for score in (min(finalist.scores), max(finalist.scores)))
        return f"{self._number(self._sign * finalist.mean)} ({self._number(low)} to {self._number(high)})"

    @staticmethod
    def _number(value: float) -> str:
        return f"{value:,.5g}"


def _size(finalist: Finalist) -> str:
    return f"{finalist.parameters:,} parameters and {finalist.epochs} epochs"
