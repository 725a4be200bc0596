"""The parts of a stage, done by `cluster.workers` processes of this machine, or by those of a Ray cluster."""

from __future__ import annotations

import importlib
import itertools
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from census_scvi.cluster.pool import Pool
from census_scvi.cluster.process import ForkedProcess
from census_scvi.cluster.settings import ClusterSection
from census_scvi.cluster.workers import Workers, threads_of_each
from census_scvi.config.run_names import LOGS, STAGING
from census_scvi.config.stages import Stage
from census_scvi.errors import UserError
from census_scvi.files.parts import Part, parts
from census_scvi.settings import Config
from census_scvi.terminal.guarded import ReportedError, guarded
from census_scvi.workspace.staged_parts import done_mark

# `run_stage(name, config, part=part)` of `stages.protocol`, which uses this module.
RunStage = Callable[..., None]


def do_parts(stage: Stage, config: Config, number: int, run_stage: RunStage) -> None:
    """Do all parts of a stage, in as many rounds as it needs; UserError: as a part alone has it, with its name."""
    staging = config.directory / STAGING / stage.name
    with _pool(stage, config, run_stage) as pool:
        for number_of_round in itertools.count(1):
            left = [part for part in parts(number) if not done_mark(staging, part).exists()]
            if not left or not staging.exists():  # another process may have finished the stage
                break
            pool.do(left, stage.name if number_of_round == 1 else f"{stage.name}, round {number_of_round}")


def join_parts(stage: Stage, config: Config, run_stage: RunStage) -> None:
    """Join the parts; after workers of this machine, in a process of their server, which has imported the libraries.

    ReportedError: it failed, and has printed why.
    """
    of_one_process = config.model_copy(update={"cluster": ClusterSection()})
    if config.cluster.address is not None:
        run_stage(stage.name, of_one_process)
        return
    process = ForkedProcess(
        partial(do_join, run_stage, stage.name, of_one_process),
        None,
        cwd=Path.cwd(),
        preload=_preload(stage),
    )
    try:
        process.wait()
    finally:
        process.stop()
    code = process.exit_code
    if code is not None and code < 0:
        raise UserError(f"the process that joins the parts was {process.failure}; run the same command again to resume")
    if code:
        raise ReportedError(code)


def do_join(run_stage: RunStage, name: str, config: Config) -> int:
    """Join the parts in a process of their own; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGHUP):  # of the terminal: the waiting process ends this one
        signal.signal(number, signal.SIG_IGN)
    return guarded(lambda: run_stage(name, config), says_how_to_resume=False)


def _pool(stage: Stage, config: Config, run_stage: RunStage) -> AbstractContextManager[Pool[Any]]:
    """What does the parts, according to the settings."""
    work, cluster = partial(do_part, run_stage, stage.name, config), config.cluster
    logs = config.directory / LOGS / stage.name
    if cluster.address is None:
        workers = Workers(work, cluster.workers, logs, preload=_preload(stage), minutes=cluster.part_minutes)
        return nullcontext(workers)
    ray_workers = importlib.import_module("census_scvi.cluster.ray_workers").ray_workers  # imports Ray
    on_ray: AbstractContextManager[Pool[Any]] = ray_workers(
        cluster.address,
        work,
        cluster.workers,
        logs,
        preload=_preload(stage),
        cpus=cluster.cpus_per_worker,
        gpus=cluster.gpus_per_worker,
        minutes=cluster.part_minutes,
    )
    return on_ray


def _preload(stage: Stage) -> tuple[str, ...]:
    """What the server of forks imports, so that not each part does."""
    return (stage.module, "census_scvi.cluster.numba_ready")


def do_part(run_stage: RunStage, name: str, config: Config, part: Part) -> int:
    """Do a part in the process of a worker; returns the exit code."""
    cluster = config.cluster
    threads = str(threads_of_each(cluster.workers) if cluster.address is None else cluster.cpus_per_worker)
    of_tiledb = {"sm.compute_concurrency_level": threads, "sm.io_concurrency_level": threads}
    census = config.census.model_copy(update={"tiledb": of_tiledb | config.census.tiledb})
    return guarded(lambda: run_stage(name, config.model_copy(update={"census": census}), part=part))
