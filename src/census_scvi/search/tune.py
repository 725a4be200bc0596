"""Trials scheduled by Ray Tune: it starts their processes within the resources, follows their epochs and stops them."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune.result import DONE
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from census_scvi.cluster import ray_session
from census_scvi.search.process import Job, TrialProcess
from census_scvi.search.trials import FINAL, FINISHED, STOPPED, Trial

# Gives the next trial; None: there is no other.
Following = Callable[[], Trial | None]

_METRIC = "elbo_validation"
_ENDED = "process_ended"  # Ray's own `done` also says that the scheduler stopped the trial
_POLL_SECONDS = 0.2
# Ray Tune must not change the current folder, write logs, or replace the handling of signals.
_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}


class TrialActor(tune.Trainable):
    """Runs one trial at a time in a process, and reports one epoch per step.

    A trial that ended before is not run again: its epochs are reported as they are recorded, so that the scheduler
    compares others with it.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Begin a trial."""
        self._trial: Trial = config["trial"]
        self._max_epochs: int = config["max_epochs"]
        self._reported = 0
        self._process = TrialProcess(self._trial, config["job"]) if self._trial.status is None else None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in this actor."""
        self.cleanup()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next epoch, or the end; the last epoch is reported with the end."""
        while True:
            running = self._process is not None and self._process.running
            losses = self._trial.curves.get(_METRIC, [])
            if len(losses) > self._reported and (not running or len(losses) < self._max_epochs):
                self._reported += 1
                last = not running and self._reported == len(losses)
                return self._result(losses[self._reported - 1], last=last)
            if not running:
                return self._result(math.inf, last=True)
            assert self._process is not None
            self._process.wait(_POLL_SECONDS)

    def _result(self, loss: float, *, last: bool) -> dict[str, Any]:
        if last and self._process is not None:
            self._process.record_end()
            self._process = None
        return {_METRIC: loss if math.isfinite(loss) else math.inf, DONE: last, _ENDED: last}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: the training keeps its own checkpoint."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing."""

    def cleanup(self) -> None:
        """Stop the process of a trial that the scheduler has stopped."""
        if self._process is not None:
            self._process.stop()
            self._process = None


class _Source(Searcher):
    """Gives Ray Tune the trials, one at a time, and hears when each ends."""

    def __init__(self, phases: Sequence[Following], ended: Callable[[Trial], None], values: Any) -> None:
        super().__init__()
        self._phases, self._ended, self._values = list(phases), ended, values
        self._running: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> Any:
        """The config of the next trial; None: trials of this phase are still running."""
        while self._phases:
            trial = self._phases[0]()
            if trial is not None:
                self._running[trial_id] = trial
                return {"trial": trial, **self._values}
            if self._running:
                return None
            del self._phases[0]
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial that did not end by itself was stopped by the scheduler, unless it was complete already."""
        trial = self._running.pop(trial_id)
        if trial.status is None and not error and not (result or {}).get(_ENDED):
            trial.end(FINISHED if trial.measured else STOPPED)
        self._ended(trial)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the folders of the trials are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class _OfTheSearch(AsyncHyperBandScheduler):
    """Stops trials of the search only: further seeds of the best settings are trained to their end."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        if trial.config["trial"].part == FINAL:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))


def asha(grace_epochs: int, max_epochs: int) -> TrialScheduler:
    """Stop trials whose validation ELBO is worse than that of others after the same epochs (Li et al. 2020)."""
    return _OfTheSearch(
        time_attr="training_iteration",
        metric=_METRIC,
        mode="min",
        grace_period=min(grace_epochs, max_epochs),
        max_t=max_epochs + 1,  # a trial ends by itself
    )


def run_trials(
    phases: Sequence[Following],
    ended: Callable[[Trial], None],
    job: Job,
    *,
    max_epochs: int,
    scheduler: TrialScheduler | None = None,
) -> None:
    """Run trials until there are no others.

    Parameters
    ----------
    phases
        Functions that return the next trial, or None if there is no other, called when there are resources for one.
        Each begins when all trials of the one before have ended.
    ended
        Function that is called with each trial at its end.
    job
        The process of a trial.
    max_epochs
        Epochs of a trial.
    scheduler
        What stops trials early; None: nothing does.
    """
    resources = {"cpu": job.cpus, "gpu": job.gpus}
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(TrialActor, resources),
            tune_config=tune.TuneConfig(
                search_alg=_Source(phases, ended, {"job": job, "max_epochs": max_epochs}),
                scheduler=scheduler or FIFOScheduler(),
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(storage_path=folder, name="trials", verbose=0),
        )
        tuner.fit()


@contextmanager
def ray_here(n_gpus: int) -> Iterator[None]:
    """Run Ray on this machine while the block runs, set up for trials."""
    os.environ |= _ENVIRONMENT
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it warns that records are off
    with ray_session.ray_here(n_gpus):
        yield
