"""Command fine-tune: prepares the cells of a newer Census that a model has not seen, and trains it further on them."""

from __future__ import annotations

import argparse
import importlib
import logging

from census_scvi.cli import Parser, read_config
from census_scvi.config.extras import require_extra
from census_scvi.errors import UserError
from census_scvi.files.uri import local_path, without_credentials
from census_scvi.settings import Config
from census_scvi.terminal.printing import printable
from census_scvi.workspace import Workspace

log = logging.getLogger(__name__)

NOTHING_NEW = 3

EPILOG = """\
settings of this command:
  fine_tune.model         model to fine-tune: run directory, published folder or its URL
  fine_tune.mode          continue: all weights; new_batches: those of new batches, the model's own cells do not move
  fine_tune.replay_cells  cells that the model has seen, to train on again (mode continue)
  census.uri, version     the newer Census
  output.directory        a new run directory
  all others: docs/settings.md; the sections model and anndata must be those of the model

It does what prepare and train do, and its run directory is one like any other: create-latent-update, evaluate and
publish follow. --check exits with 0 if there are new cells, and with 3 if there are none. --decide writes decision/ in
the run directory: the models that it trains there, decision.json and report.html."""
EXAMPLE = "--config run.yaml fine_tune.model=run census.version=2026-05-11 output.directory=run2"


def add_arguments(parser: Parser) -> None:
    """Add the arguments that only this command has."""
    parser.add_argument("--check", action="store_true", help="only show what is new in the Census; change nothing")
    parser.add_argument(
        "--decide",
        action="store_true",
        help="measure on held-out cells whether to keep the model, fine-tune it or train it again",
    )


def run(arguments: argparse.Namespace) -> None:
    """Fine-tune, or show what is new."""
    config = read_config(arguments)
    _require_places(config, writes=not arguments.check)
    if arguments.check or arguments.dry_run:
        _show(config, check=arguments.check, decide=arguments.decide)
        return
    _require_processes(config, decide=arguments.decide)
    if arguments.decide:
        require_extra("evaluate", "scvi-fine-tune.py --decide")
        importlib.import_module("census_scvi.stages.decision").decide(config, force=arguments.force)
        return
    # Imported here, because torch and scvi-tools take seconds to import and --help must be fast.
    from census_scvi.stages.protocol import is_follower, run_stage

    if not is_follower():  # a further process of the training: the first one has prepared the cells
        run_stage("prepare", config, force=arguments.force)
    run_stage("train", config, force=arguments.force)
    log.info("next: scvi-create-latent-update.py embeds all cells of this Census with the model")


def _require_places(config: Config, *, writes: bool) -> None:
    """UserError if there is no model, or it is in the run directory that the command writes."""
    place = config.fine_tune.model
    if place is None:
        raise UserError("fine_tune.model is not set; give a run directory, a published folder or its URL")
    path = local_path(place)
    if writes and path is not None and config.directory.resolve() in (path.resolve(), path.resolve().parent):
        raise UserError(
            f"output.directory {config.directory} is the run directory of fine_tune.model; give a new folder: the model"
            " stays as it is"
        )


def _require_processes(config: Config, *, decide: bool) -> None:
    """UserError if several nodes would decide, or prepare the cells."""
    n_nodes = config.train.num_nodes
    if n_nodes == 1:
        return
    if decide:
        raise UserError(f"train.num_nodes is {n_nodes}, and --decide trains on one device; remove it")
    if Workspace(config.directory).record("prepare") is None:
        raise UserError(
            f"train.num_nodes is {n_nodes}, and the cells are not prepared yet; run scvi-prepare.py with this"
            " config on one node, then this command on each"
        )


def _show(config: Config, *, check: bool, decide: bool) -> None:
    """Print what is new, and the plan unless `check` is set; with it, exits with `NOTHING_NEW` if nothing is."""
    from census_scvi.census.genes import locate_genes
    from census_scvi.census.open import open_census
    from census_scvi.fine_tuning.new_cells import as_text, new_by
    from census_scvi.fine_tuning.selection import select_for_fine_tuning
    from census_scvi.fine_tuning.start import load_for_fine_tuning
    from census_scvi.stages.fine_tuning_ways import plan_decision, plan_fine_tuning

    tune = config.fine_tune
    _, description = load_for_fine_tuning(tune, config.model, config.census.organism, config.anndata.batch_key)
    shown = without_credentials(str(tune.model))
    with open_census(config.census) as census:
        missing = int((locate_genes(census, description.genes, config.genes.min_share, "genes.min_share") < 0).sum())
        selection = select_for_fine_tuning(census, tune, config.census, description, config.training_filter)
        by_dataset = new_by(census, selection.found, "dataset_id") if selection.found.new.any() else {}
        lines = as_text(selection.found, by_dataset, shown)
        lines.append(f"{missing:,} of the model's {len(description.genes):,} genes are not in this Census")
        print(printable("\n".join(lines)))
        if check:
            if not selection.found.new.any():
                raise SystemExit(NOTHING_NEW)
            return
        plan = (plan_decision if decide else plan_fine_tuning)(config, census, selection, description)
    print(printable(plan.text(config)))
