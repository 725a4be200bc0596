"""The parts of a stage, done by `cluster.workers` processes of this machine."""

from __future__ import annotations

import itertools
from functools import partial

from census_scvi.cli import guarded
from census_scvi.cluster.workers import Workers, threads_of_each
from census_scvi.config.run_names import LOGS, STAGING
from census_scvi.config.stages import Stage
from census_scvi.files.parts import Part, parts
from census_scvi.settings import Config
from census_scvi.stages import protocol
from census_scvi.workspace.staged_parts import done_mark


def do_parts(stage: Stage, config: Config, number: int) -> None:
    """Do all parts of a stage, in as many rounds as it needs; UserError: as a part alone has it, with its name."""
    work = partial(do_part, stage.name, config)
    staging, logs = config.directory / STAGING / stage.name, config.directory / LOGS / stage.name
    workers = Workers(work, config.cluster.workers, logs, preload=(stage.module,))
    for number_of_round in itertools.count(1):
        left = [part for part in parts(number) if not done_mark(staging, part).exists()]
        if not left or not staging.exists():  # another process may have finished the stage
            break
        workers.do(left, stage.name if number_of_round == 1 else f"{stage.name}, round {number_of_round}")


def do_part(name: str, config: Config, part: Part) -> int:
    """Do a part in the process of a worker; returns the exit code."""
    threads = str(threads_of_each(config.cluster.workers))
    of_tiledb = {"sm.compute_concurrency_level": threads, "sm.io_concurrency_level": threads}
    census = config.census.model_copy(update={"tiledb": of_tiledb | config.census.tiledb})
    return guarded(lambda: protocol.run_stage(name, config.model_copy(update={"census": census}), part=part))
