"""The parts of a stage, done by `cluster.workers` processes of this machine."""

from __future__ import annotations

from functools import partial

from census_scvi.cli import guarded
from census_scvi.cluster.workers import Workers, threads_of_each
from census_scvi.config.run_names import LOGS
from census_scvi.config.stages import Stage
from census_scvi.files.parts import Part, parts
from census_scvi.settings import Config
from census_scvi.stages import protocol


def do_parts(stage: Stage, config: Config, number: int) -> None:
    """Do all parts of a stage; UserError as a part alone would have it, with the part's name."""
    work = partial(do_part, stage.name, config)
    logs = config.directory / LOGS / stage.name
    Workers(work, config.cluster.workers, logs, preload=(stage.module,)).do(parts(number), stage.name)


def do_part(name: str, config: Config, part: Part) -> int:
    """Do a part in the process of a worker; returns the exit code."""
    threads = str(threads_of_each(config.cluster.workers))
    of_tiledb = {"sm.compute_concurrency_level": threads, "sm.io_concurrency_level": threads}
    census = config.census.model_copy(update={"tiledb": of_tiledb | config.census.tiledb})
    return guarded(lambda: protocol.run_stage(name, config.model_copy(update={"census": census}), part=part))
