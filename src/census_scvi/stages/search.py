"""Command search: tries settings on the prepared cells, and chooses between the best by the spread of their seeds."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from census_scvi.config.run_names import PROGRESS, REPORT, SEARCH
from census_scvi.errors import UserError
from census_scvi.files.atomic import remove, write_json, write_text
from census_scvi.files.uri import without_credentials
from census_scvi.search.choose import Choice, choose
from census_scvi.search.process import Job
from census_scvi.search.space import n_combinations
from census_scvi.search.study import Study, all_failed, most_trainings
from census_scvi.search.table import table_of
from census_scvi.search.trials import TRIALS, Trial
from census_scvi.search.tune import ray_here
from census_scvi.settings import Config, load_config
from census_scvi.settings.search_space import (
    data_config,
    data_settings,
    default_settings,
    in_space,
    require_searchable,
    trial_config,
    trial_values,
)
from census_scvi.stages.plan import Plan
from census_scvi.stages.protocol import Task, run_stage
from census_scvi.stages.search_trial import train_and_measure, validation_data
from census_scvi.workspace import Workspace

log = logging.getLogger(__name__)

TABLE, WINNER, PREPARED = "trials.csv", "winner.yaml", "prepared"
_PRELOAD = ("census_scvi.stages.train", "census_scvi.search.measure", "census_scvi.stages.search_trial")
# Ray on this machine and the server of the trials, before the first trial.
_BASE_MEMORY, _FIXED_SECONDS = 1.5e9, 30.0


def run(task: Task) -> None:
    """Run all trials, choose, and write trials.csv, winner.yaml and report.html; a killed search resumes."""
    config, folder = task.config, task.directory
    require_searchable(config)
    gpus_here, job = _job(config)
    _require_measurable(config)
    from census_scvi.report.search import write_search_report  # imports the libraries of all figures, for seconds

    if not task.run.resumed:
        remove(folder / TRIALS)
        remove(folder / PREPARED)
    task.start()
    write_json(task.run.path(PROGRESS), {})
    study = _study(config, folder, job, _at_a_time(job, gpus_here))
    log.info("at most %d trainings, %d at a time", most_trainings(config.search), study.at_a_time)
    for settings in _data_choices(config):
        _prepared(config, folder, settings)
    with ray_here(gpus_here):
        study.run()
    if not any(study.of(trial.settings) for trial in study.trials):
        _write_table(folder / TABLE, study, config)
        raise UserError(f"{all_failed(study.trials)}; {folder / TABLE} lists them")
    _require_ended(study)
    choice = _choice(study, config)
    _write_table(task.run.path(TABLE), study, config)
    write_text(task.run.path(WINNER), _winner(config, folder, choice))
    write_search_report(task.run.path(REPORT), study, choice, config.search, list(data_settings(config.search.space)))
    counts = {"trials": len(study.trials), "settings": len({json.dumps(trial.settings) for trial in study.trials})}
    task.commit([TABLE, WINNER, REPORT], counts, winner=choice.winner.settings, sentence=choice.sentence)
    log.info("%s", choice.sentence)
    log.info("wrote %s, %s and %s", folder / TABLE, folder / WINNER, folder / REPORT)


def _at_a_time(job: Job, gpus_here: int) -> int:
    """Number of trials that run on this machine at a time."""
    number = max((os.cpu_count() or 1) // job.cpus, 1)
    return min(number, int(gpus_here / job.gpus)) if job.gpus else number


def _study(config: Config, folder: Path, job: Job, at_a_time: int) -> Study:
    default = default_settings(config)
    return Study(
        folder=folder.absolute(),
        settings=config.search,
        seed=config.seed,
        max_epochs=max(_epochs(config)),
        default=default if in_space(config, default) else {},
        prepare=partial(_prepare_trial, config, folder),
        job=job,
        at_a_time=at_a_time,
    )


def _epochs(config: Config) -> list[int]:
    """Epochs of trials: the budget, or the searched values."""
    searched = config.search.space.get("train.max_epochs")
    if searched is None:
        return [config.search.max_epochs or config.train.max_epochs]
    return [int(value) for value in (searched if isinstance(searched, list) else [searched.low, searched.high])]


def _job(config: Config) -> tuple[int, Job]:
    """Number of GPUs here, and how trials run; UserError if a trial asks for more than this machine has."""
    import torch

    search, cores, here = config.search, os.cpu_count() or 1, torch.cuda.device_count()
    gpus = float(min(here, 1)) if search.gpus_per_trial is None else search.gpus_per_trial
    if search.cpus_per_trial > cores:
        raise UserError(
            f"search.cpus_per_trial is {search.cpus_per_trial}, and this machine has {cores} cores; lower it"
        )
    if gpus > here:
        raise UserError(f"search.gpus_per_trial is {gpus:g}, and torch finds {here} GPU(s) here; lower it")
    if gpus > 1 and gpus != int(gpus):
        raise UserError(f"search.gpus_per_trial is {gpus:g}, expected a whole number, or a part of one GPU such as 0.5")
    return here, Job(train_and_measure, _PRELOAD, str(Path.cwd()), search.cpus_per_trial, gpus)


def _require_measurable(config: Config) -> None:
    """UserError if the metric cannot be measured on the validation cells, checked before the first trial."""
    data = validation_data(config)
    if not data.n_val:
        raise UserError("a search needs validation cells, and there is none; lower train.train_size")
    from census_scvi.metrics.score import FEWEST_CELLS  # imports scib-metrics, for seconds

    weights, path = config.search.weights, data.cells.path
    for part, columns in (("bio", config.evaluate.labels[:1]), ("batch", config.evaluate.batches[:1])):
        if part not in weights:
            continue
        setting = f"evaluate.{'labels' if part == 'bio' else 'batches'}"
        values = data.cells.obs(columns, setting)[columns[0]][data.validation]
        sizes = values.value_counts()
        if (sizes >= FEWEST_CELLS).sum() < 2:
            raise UserError(
                f"search.metric has {part}, and {columns[0]} (the first of {setting}) has fewer than two values with"
                f" {FEWEST_CELLS} or more of the {data.n_val:,} held-out cells of {path}; change train.held_out or"
                f" {setting}"
            )
    trained = set(data.cells.batch_codes[data.training])
    unseen = set(data.cells.batch_codes[data.validation]) - trained
    if unseen and "elbo" in weights:
        raise UserError(
            f"search.metric has the ELBO, and batch {data.cells.batches[min(unseen)]!r} is only in validation cells:"
            " the decoder does not know it, so its ELBO says nothing; set search.metric to bio or batch, or hold out"
            " donors of batches that are also trained on"
        )


def _data_choices(config: Config) -> list[dict[str, Any]]:
    """Every combination of the settings that change the prepared file."""
    choices: list[dict[str, Any]] = [{}]
    for name, values in config.search.space.items():
        if data_settings({name: None}):
            assert isinstance(values, list)  # `require_searchable` refuses a range
            choices = [choice | {name: value} for choice in choices for value in values]
    return choices


def _prepared(config: Config, folder: Path, settings: dict[str, Any]) -> Path:
    """Run directory with the prepared cells of some settings: the search's own, or one in its folder."""
    wanted = data_settings(settings)
    if all(value == wanted[name] for name, value in default_settings(config).items() if name in wanted):
        return config.directory
    name = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:8]
    directory = folder / PREPARED / name
    if Workspace(directory).record("prepare") is None:
        log.info("preparing cells with %s in %s", json.dumps(wanted), directory)
        run_stage("prepare", data_config(config, settings, directory))
    return directory


def _prepare_trial(config: Config, folder: Path, trial: Trial) -> None:
    """Write the folder of a trial."""
    values = trial_values(trial_config(config, trial.settings, trial.seed, trial.folder))
    trial.prepare(_prepared(config, folder, trial.settings), values)


def _require_ended(study: Study) -> None:
    if left := [trial for trial in study.trials if trial.status is None]:
        raise UserError(
            f"{len(left)} trials were interrupted, the first in {left[0].folder}; run the same command again"
        )


def _write_table(path: Path, study: Study, config: Config) -> None:
    table = table_of(study.trials, list(config.search.space), config.search.weights)
    write_text(path, table.to_csv(index=False))


def _choice(study: Study, config: Config) -> Choice:
    found = study.results()
    if not found:
        raise UserError(
            f"no settings finished with all of {config.search.final_seeds} further seeds; {study.folder / TRIALS} has"
            f" the log of each trial, the first failure is: {all_failed(study.trials)}"
        )
    return choose(found, config.search.weights)


def _winner(config: Config, folder: Path, choice: Choice) -> str:
    """Text of winner.yaml: the settings in which the winner differs from the config file, which it extends."""
    settings = choice.winner.settings
    wanted = trial_config(config, settings, config.seed, _prepared(config, folder, settings))
    values = without_credentials(wanted.model_dump(mode="json", exclude={"search"}))
    lines = [
        f"# {choice.sentence}",
        f"# census-scvi train --config {folder / WINNER} trains the model with seed {config.seed} again.",
    ]
    if config.file is not None:
        base = load_config(config.file)
        lines.append(f"extends: {os.path.relpath(config.file, folder)}")
        values = _difference(values, without_credentials(base.model_dump(mode="json")))
    return "\n".join(lines) + "\n" + (yaml.safe_dump(values, sort_keys=False) if values else "")


def _difference(values: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Values that differ from those before, nested as they are."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(before.get(name), dict):
            if inner := _difference(value, before[name]):
                found[name] = inner
        elif name not in before or value != before[name]:
            found[name] = value
    return found


def plan(config: Config) -> Plan:
    """Plan of a search: its trials, and their time from that of the config's own settings."""
    from census_scvi.stages import train  # imports scvi-tools, which the search itself does not need

    require_searchable(config)
    search, folder = config.search, config.directory / SEARCH
    Workspace(config.directory).require("prepare", [config.artifacts.prepared])
    gpus_here, job = _job(config)
    _require_measurable(config)
    one = train.plan(trial_config(config, {}, config.seed, config.directory))
    combinations = n_combinations(search.space)
    settings = min(search.trials, combinations or search.trials)
    trainings, together = most_trainings(search), _at_a_time(job, gpus_here)
    choices = len(_data_choices(config))
    return Plan(
        "search",
        reads=one.reads,
        writes=[str(folder / name) for name in (TABLE, WINNER, REPORT)] + [f"{folder / TRIALS}/"],
        cells=one.cells,
        genes=one.genes,
        memory=_BASE_MEMORY + together * one.memory,
        disk=trainings * one.disk,
        seconds=_FIXED_SECONDS + trainings * one.seconds / together,
        notes=[
            f"{settings} different settings of {combinations or 'infinitely many'}, {search.seeds} seed(s) each; then"
            f" the best two and the default with {search.final_seeds} further seeds",
            f"{together} trial(s) at a time, {job.cpus} core(s) and {job.gpus:g} GPU(s) each; time and memory are those"
            " of the config's own settings, larger models need more",
            *([f"prepare runs for {choices} data sets"] if choices > 1 else []),
        ],
    )
