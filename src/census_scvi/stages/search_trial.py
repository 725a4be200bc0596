"""Work of the process of a trial of a search: the command train, then the measures of its model.

Slow modules are imported by the process of the trial only: Ray's own processes import this module, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from census_scvi.cli import main
from census_scvi.search.trials import CONFIG, Trial
from census_scvi.settings import Config, load_config
from census_scvi.terminal.guarded import DONE

if TYPE_CHECKING:
    from census_scvi.counts.data_module import PreparedDataModule


def train_and_measure(trial: Trial) -> int:
    """Train a trial, and measure its model on the validation cells; returns the exit code."""
    file = trial.folder / CONFIG
    if code := main("train", ["--config", str(file)]):
        return code
    from census_scvi.search.measure import Columns, measure

    config = load_config(file)
    evaluate = config.evaluate
    trial.keep_measured(
        measure(
            config.directory / config.artifacts.model,
            validation_data(config),
            Columns(evaluate.labels, evaluate.batches, evaluate.donors),
            n_cells=evaluate.measured_cells,
            seed=config.seed if config.train.split_seed is None else config.train.split_seed,
        )
    )
    return DONE


def validation_data(config: Config) -> PreparedDataModule:
    """The prepared cells of a run directory, with training and validation cells as the command train divides them."""
    from census_scvi.counts.data_module import PreparedDataModule

    settings = config.train
    return PreparedDataModule(
        config.directory / config.artifacts.prepared,
        batch_size=settings.batch_size,
        train_size=settings.train_size,
        seed=config.seed,
        workers=0,
        held_out=settings.held_out,
        split_seed=settings.split_seed,
        max_cells=settings.max_cells,
    )
