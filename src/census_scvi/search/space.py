"""The space of a search as Optuna's distributions, and which settings are tried next."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from census_scvi.config.random_streams import Stream, generator
from census_scvi.search.settings import Range

Settings = dict[str, Any]
Space = Mapping[str, list[Any] | Range]

# Draws of one setting before the space counts as exhausted; settings that were drawn before are drawn again.
_MOST_DRAWS = 200

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Tried:
    """Settings that were tried.

    Attributes
    ----------
    settings
        Value by dotted name.
    score
        Mean score over the seeds, higher is better; None: failed, or not finished.
    intermediate
        Score by epoch, of a trial that was stopped early.
    """

    settings: Settings
    score: float | None
    intermediate: dict[int, float] = field(default_factory=dict)


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's distribution of each setting; a choice is among the JSON texts of its values."""
    found: dict[str, BaseDistribution] = {}
    for name, values in space.items():
        if isinstance(values, list):
            found[name] = CategoricalDistribution([json.dumps(value) for value in values])
        elif isinstance(values.low, int) and isinstance(values.high, int):
            found[name] = IntDistribution(values.low, values.high, log=values.log)
        else:
            found[name] = FloatDistribution(values.low, values.high, log=values.log)
    return found


def n_combinations(space: Space) -> int | None:
    """Number of different settings of the space; None if it has a range."""
    number = 1
    for values in space.values():
        if isinstance(values, Range):
            return None
        number *= len(values)
    return number


def study_of(space: Space, tried: Sequence[Tried]) -> optuna.Study:
    """A study in memory with the settings that were tried."""
    study = optuna.create_study(direction="maximize")
    kinds = distributions(space)
    for each in tried:
        if each.settings.keys() == kinds.keys():
            study.add_trial(_frozen(each, kinds))
    return study


def _frozen(tried: Tried, kinds: dict[str, BaseDistribution]) -> FrozenTrial:
    parameters = {
        name: json.dumps(tried.settings[name]) if isinstance(kind, CategoricalDistribution) else tried.settings[name]
        for name, kind in kinds.items()
    }
    state = TrialState.FAIL if tried.score is None else TrialState.COMPLETE
    if tried.score is None and tried.intermediate:
        state = TrialState.PRUNED
    return optuna.trial.create_trial(
        params=parameters,
        distributions=kinds,
        value=tried.score,
        state=state,
        intermediate_values=tried.intermediate,
    )


def suggest(space: Space, tried: Sequence[Tried], searcher: str, seed: int) -> Settings | None:
    """Settings to try next, which were not tried before; None if there are no others.

    Parameters
    ----------
    space
        The space.
    tried
        The settings so far, those that are still trained included.
    searcher
        `tpe` or `random`.
    seed
        Seed; the result depends only on it and on `tried`.
    """
    if len(tried) == n_combinations(space):
        return None
    kinds, seen = distributions(space), [each.settings for each in tried]
    numbers = generator(seed, Stream.SEARCHED_SETTINGS, len(tried))
    study = study_of(space, tried)
    for attempt in range(_MOST_DRAWS):
        draw = int(numbers.integers(2**32))
        study.sampler = optuna.samplers.RandomSampler(seed=draw)
        if searcher == "tpe" and attempt < _MOST_DRAWS // 10:
            study.sampler = optuna.samplers.TPESampler(seed=draw, n_startup_trials=_n_random(space))
        asked = study.ask(kinds).params
        settings = {
            name: json.loads(value) if isinstance(kinds[name], CategoricalDistribution) else value
            for name, value in asked.items()
        }
        if settings not in seen:
            return settings
    return None


def _n_random(space: Space) -> int:
    """Settings that are drawn at random before TPE learns from them."""
    return 2 * len(space) + 2
