"""A search: the trials of the space, then the best settings with further seeds; every step resumes from the folders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean

from census_scvi.search.choose import N_BEST, Finalist, distinct, finalists, measures_of, score_of, tried_of, words_of
from census_scvi.search.process import Job
from census_scvi.search.settings import SearchSection
from census_scvi.search.space import Settings, n_combinations, suggest
from census_scvi.search.trials import FAILED, FINAL, FINISHED, SEARCHED, STOPPED, Trial, new_trial, trials_of
from census_scvi.search.tune import Following, asha, run_trials

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """What a search is made of.

    Attributes
    ----------
    folder
        Folder of the search.
    settings
        The section `search`.
    seed
        The first seed of trials, and the seed of the searcher.
    max_epochs
        Epochs of a trial.
    default
        The config's own values of the searched settings; {} if the space does not contain them.
    prepare
        Function that writes the folder of a trial that is trained next.
    job
        The process of a trial.
    at_a_time
        Number of trials that run at a time.
    """

    folder: Path
    settings: SearchSection
    seed: int
    max_epochs: int
    default: Settings
    prepare: Callable[[Trial], None]
    job: Job
    at_a_time: int

    @property
    def trials(self) -> list[Trial]:
        """All trials so far."""
        return trials_of(self.folder)

    def run(self) -> None:
        """Train the trials of the space, then the best settings and the default with further seeds.

        What ended before is not trained again. Nothing is confirmed if no trial finished.
        """
        scheduled = self.settings.scheduler == "asha"
        before = [trial for trial in self.trials if trial.part == SEARCHED and (scheduled or trial.status is None)]
        scheduler = asha(self.settings.grace_epochs, self.max_epochs) if scheduled else None
        phases = [self._prepared(lambda: before.pop(0) if before else self._next()), self._prepared(self._confirming())]
        while phases and (first := phases[0]()) is None:
            del phases[0]
        if phases:  # else nothing is left to train
            waiting, rest = [first], phases[0]
            phases[0] = lambda: waiting.pop() if waiting else rest()
            run_trials(phases, self._log, self.job, max_epochs=self.max_epochs, scheduler=scheduler)

    def _next(self) -> Trial | None:
        """The next seed of the last settings, or the first seed of others; None at the end of the search."""
        mine = [trial for trial in self.trials if trial.part == SEARCHED]
        every = distinct([trial.settings for trial in mine])
        seeds = range(self.seed, self.seed + self.settings.seeds)
        for settings in every[-1:]:
            used = {trial.seed for trial in mine if trial.settings == settings}
            if left := [seed for seed in seeds if seed not in used]:
                return new_trial(self.folder, settings, left[0], SEARCHED)
        if len(every) == self.settings.trials:
            return None
        tried = tried_of(mine, self.settings.weights)
        following = suggest(self.settings.space, tried, self.settings.searcher, self.seed)
        return None if following is None else new_trial(self.folder, following, self.seed, SEARCHED)

    def _confirming(self) -> Following:
        """The best settings and the default, with further seeds, and with the first one where it is missing."""
        wanted: list[tuple[Settings, int]] | None = None

        def following() -> Trial | None:
            nonlocal wanted
            if wanted is None:  # the trials of the space have ended
                found = self.finalists() if any(trial.status == FINISHED for trial in self.trials) else []
                wanted = [(settings, seed) for settings in found for seed in (self.seed, *self.final_seeds)]
            return self._missing(wanted)

        return following

    def finalists(self) -> list[Settings]:
        """The best settings of the search, and the default."""
        return finalists(tried_of(self.trials, self.settings.weights), self.default)

    @property
    def final_seeds(self) -> range:
        """Seeds that the search itself did not use: what was best with one seed is often lucky with it."""
        first = self.seed + self.settings.seeds
        return range(first, first + self.settings.final_seeds)

    def _missing(self, wanted: list[tuple[Settings, int]]) -> Trial | None:
        """The next of the wanted trainings that is not there, or did not end."""
        while wanted:
            settings, seed = wanted.pop(0)
            there = self._trained(settings, seed)
            if there is None:
                return new_trial(self.folder, settings, seed, FINAL)
            if there.status is None:
                return there
        return None

    def _trained(self, settings: Settings, seed: int) -> Trial | None:
        """The training of settings and a seed to the end of its budget, begun or finished."""
        return next(
            (
                trial
                for trial in self.trials
                if trial.settings == settings and trial.seed == seed and trial.status != STOPPED
            ),
            None,
        )

    def results(self) -> list[Finalist]:
        """The finalists of which every seed was trained; one that failed with a seed is not among them."""
        found = []
        for settings in self.finalists():
            trials = [self._trained(settings, seed) for seed in (self.seed, *self.final_seeds)]
            scores = [None if trial is None else score_of(trial, self.settings.weights) for trial in trials]
            if any(score is None for score in scores):
                continue
            first = trials[0]
            assert first is not None and first.record is not None
            counts = first.record["counts"]
            known = tuple(score for score in scores[1:] if score is not None)
            changed = sum(self.default.get(name) != value for name, value in settings.items())
            found.append(Finalist(settings, known, int(counts["parameters"]), int(counts["epochs"]), changed))
        return found

    def of(self, settings: Settings) -> list[Trial]:
        """The trials of some settings that finished, by seed."""
        found = [trial for trial in self.trials if trial.settings == settings and trial.status == FINISHED]
        return sorted(found, key=lambda trial: trial.seed)

    def _prepared(self, following: Following) -> Following:
        """The trials of a function, whose folders are written before they are trained."""

        def give() -> Trial | None:
            trial = following()
            if trial is not None and trial.status is None:
                self.prepare(trial)
            return trial

        return give

    def _log(self, trial: Trial) -> None:
        epochs = len(trial.curves.get("elbo_train", []))
        numbers = [f"{name} {value:,.4g}" for name, value in measures_of(trial).items() if value is not None]
        how = {FINISHED: "finished", STOPPED: "stopped early", FAILED: f"failed: {trial.error}"}
        log.info(
            "trial %d (%s, seed %d) %s after %d epochs%s%s",
            trial.number,
            words_of(trial.settings),
            trial.seed,
            how.get(str(trial.status), "was interrupted"),
            epochs,
            f": {', '.join(numbers)}" if numbers else "",
            self._left(),
        )

    def _left(self) -> str:
        """The time that other trainings take if each takes as long as those so far."""
        ended = [trial for trial in self.trials if trial.status is not None]
        number = most_trainings(self.settings) - len(ended)
        seconds = number * fmean(trial.cost.get("seconds", 0.0) for trial in ended) / self.at_a_time if ended else 0.0
        left = timedelta(seconds=round(seconds))
        return f"; at most {number} other trainings, about {left} left" if left and number > 0 else ""


def most_trainings(search: SearchSection) -> int:
    """Largest number of trainings of a search: those of the space, then the best settings and the default again."""
    settings = min(search.trials, n_combinations(search.space) or search.trials)
    return settings * search.seeds + (N_BEST + 1) * search.final_seeds + 1


def all_failed(trials: Sequence[Trial]) -> str:
    """Why no trial can be used, in one line."""
    failed = [trial for trial in trials if trial.status == FAILED]
    if not failed:
        return f"none of {len(trials)} trials has the metric"
    return f"all {len(failed)} trials failed, trial {failed[0].number} with: {failed[0].error}"
