"""Common procedure of all stages: lock, check inputs, decide (done, refuse, resume, start), work, record.

Slow modules are imported only if there is work to do.
"""

from __future__ import annotations

import importlib
import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from census_scvi.annotation.results.places import annotate_results
from census_scvi.config.extras import require_extra
from census_scvi.config.run_names import FIRST_PROCESS, SEARCH, STAGING
from census_scvi.config.stages import STAGES, Stage
from census_scvi.errors import UserError
from census_scvi.files.parts import Part
from census_scvi.files.uri import without_credentials
from census_scvi.query.places import query_results
from census_scvi.releases.places import comparison_place
from census_scvi.report.named import evaluation_place
from census_scvi.settings import Config
from census_scvi.stages.inputs import inputs_of
from census_scvi.stages.plan import Plan
from census_scvi.terminal.guarded import IN_FOLDER
from census_scvi.workspace import Artifacts, StageRun, Workspace
from census_scvi.workspace.first_process import FirstProcess
from census_scvi.workspace.record import Fingerprint, changes, fingerprint_of
from census_scvi.workspace.result_files import ResultFiles
from census_scvi.workspace.staged_parts import begin_part, divide, done_mark, part_lock

if TYPE_CHECKING:
    from census_scvi.census.open import Census

log = logging.getLogger(__name__)

# Environment variables that Lightning reads for the rank of this process in a distributed training.
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
# Environment variables for the number of processes.
_SIZES = ("WORLD_SIZE", "SLURM_NTASKS", "JSM_NAMESPACE_SIZE")


@dataclass
class Task:
    """Everything that the work of a stage needs.

    Attributes
    ----------
    config
        The settings.
    artifacts
        Names of files and folders in the run directory.
    run
        The run: where the stage writes, whether it resumes. Call `start` before anything is written.
    place
        The location of the results, locked by this process.
    census
        The open `Census` if the stage reads it; else None.
    first
        Signals from this process, the first, to the others, if several processes train; else None.
    """

    config: Config
    artifacts: Artifacts
    run: Any  # StageRun, or ResultFilesRun of map-query
    place: Any  # Workspace, or ResultFiles of map-query
    census: Any
    first: FirstProcess | None = None

    @property
    def directory(self) -> Path:
        """The folder of the results."""
        return Path(self.place.directory)

    def start(self) -> None:
        """Begin to write, see `StageRun.start`; then let other processes join."""
        self.run.start()
        if self.first is not None:
            self.first.open()

    def commit(self, artifacts: list[str], counts: dict[str, Any], **details: Any) -> None:
        """Move the written files to their places, and record the stage as done; see `StageRun.commit`."""
        config = without_credentials(self.config.model_dump(mode="json"))
        self.run.commit(artifacts, counts, config=config, seed=self.config.seed, **details)


def run_stage(name: str, config: Config, *, force: bool = False, part: Part | None = None) -> None:
    """Run a stage, or a part of it, unless it is done for these settings.

    Raises
    ------
    UserError
        The location is locked or holds results of other settings or inputs; or the stage itself fails.
    """
    try:
        _run(STAGES[name], config, force=force, part=part)
    except Exception as error:
        error.add_note(f"{IN_FOLDER}{config.directory}")
        raise


def _run(stage: Stage, config: Config, *, force: bool, part: Part | None) -> None:
    if stage.several_processes and is_follower():
        _follow(stage, config, force=force)
        return
    with ExitStack() as stack:
        if part is not None:
            _run_part(stage, config, part, stack)
            return
        if stage.parts and config.cluster.divides:
            if config.cluster.address is not None:
                require_extra("cluster", "cluster.address")
            place = Workspace(config.directory)
            stack.enter_context(place.dividing(stage.name, new=not stage.reads, patience=config.cluster.patience))
        _run_whole(stage, config, force=force)


def _run_whole(stage: Stage, config: Config, *, force: bool = False) -> None:
    """Run a stage that several processes do not share, or divide it into parts, which workers do; then join them."""
    name = stage.name
    place, new = _place(stage, config)
    with ExitStack() as stack:
        stack.enter_context(place.locked(stage.records or name, new=new))
        first = None
        if stage.several_processes and _is_one_of_several(config) and config.directory.exists():
            first = _first_process(config)
            stack.enter_context(first.leading())
        census = _open_census(stage, config, stack)
        run = place.begin(
            stage.records or name,
            config.of_stage(name),
            inputs_of(stage, config, census),
            force=force,
            progress=stage.progress,
            defaults=Config().of_stage(name),
        )
        if run.done:
            if name == "publish":
                _require_published(config, place, census)
            elif name == "index":
                _module(stage).when_done(config)
            log.info("%s is done for these settings in %s; --force runs it again", name, place)
            return
        n_parts = 1
        if stage.parts and config.cluster.divides and isinstance(run, StageRun) and census is not None:
            n_parts = divide(run, config.cluster.n_parts(census.experiment.obs.count))
        if n_parts == 1:
            try:
                _module(stage).run(Task(config, config.artifacts, run, place, census, first))
            finally:
                if stage.progress is None:
                    run.discard()
            return
    # The directory is not locked now: the workers lock it together, then this process alone.
    workers = importlib.import_module("census_scvi.stages.workers")
    workers.do_parts(stage, config, n_parts, run_stage)
    workers.join_parts(stage, config, run_stage)


def _run_part(stage: Stage, config: Config, part: Part, stack: ExitStack) -> None:
    """Do a part of a stage, next to other processes that do other parts."""
    place = stack.enter_context(Workspace(config.directory).locked(stage.name, new=not stage.reads, shared=True))
    census = _open_census(stage, config, stack)
    inputs, defaults = inputs_of(stage, config, census), Config().of_stage(stage.name)
    run = begin_part(place, stage.name, part, config.of_stage(stage.name), inputs, str(stage.progress), defaults)
    if run.done:
        log.info("%s is done for these settings in %s", stage.name, place)
        return
    stack.enter_context(part_lock(run, part, config.cluster.patience))
    mark = done_mark(run.staging, part)
    if not mark.exists() and not _module(stage).run_part(Task(config, config.artifacts, run, place, census), part):
        log.info("%s of %s can go on when all parts are as far: run them again", part, stage.name)
        return
    mark.touch()
    log.info("%s of %s is done; when all are, %s joins them", part, stage.name, stage.script)


def plan_stage(name: str, config: Config) -> Plan:
    """Plan of a stage; changes nothing."""
    plan: Plan = _module(STAGES[name]).plan(config)
    return plan


def _place(stage: Stage, config: Config) -> tuple[Workspace | ResultFiles, bool]:
    """Location of the results, and whether its folder may be created."""
    if stage.name == "map-query":
        return query_results(config.query, config.directory), False
    if stage.name == "annotate":
        results = annotate_results(config.query, config.annotate)
        if config.annotate.action == "train":
            results.directory.mkdir(parents=True, exist_ok=True)
        return results, False
    if stage.name == "evaluate":
        return evaluation_place(config.evaluate, config.evaluation_folder), True
    if stage.name == "compare-releases":
        return comparison_place(config.compare_releases, config.comparison_folder), True
    if stage.name == "search":
        return Workspace(config.directory / SEARCH), config.directory.exists()
    return Workspace(config.directory), not stage.reads


def _open_census(stage: Stage, config: Config, stack: ExitStack) -> Census | None:
    if not stage.reads_census:
        return None
    from census_scvi.census.open import open_census

    return stack.enter_context(open_census(config.census))


def _require_published(config: Config, workspace: Any, census: Any) -> None:
    """UserError if the publication of a finished run no longer exists."""
    from census_scvi.publication import target

    publication = str((workspace.whole_record("publish") or {}).get("publication"))
    target.require_published(config.publish, target.experiment_uri(config.publish, census), publication)


def _module(stage: Stage) -> Any:
    return importlib.import_module(stage.module)


def is_follower() -> bool:
    """Whether this process has a rank above 0; rank 0 manages the run directory."""
    return any(_number(name) > 0 for name in _RANKS)


def _is_one_of_several(config: Config) -> bool:
    """Whether several processes train, according to the settings or the launcher's environment."""
    return config.train.multi_gpu or config.train.num_nodes > 1 or any(_number(name) > 1 for name in _SIZES)


def _number(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else 0


def _first_process(config: Config) -> FirstProcess:
    return FirstProcess(config.directory / STAGING / FIRST_PROCESS)


def _follow(stage: Stage, config: Config, *, force: bool) -> None:
    """Do a stage's work in a process of rank above 0, after the first process opens it; nothing if it is done."""
    run = StageRun(stage=stage.name, fingerprint={}, workspace=Workspace(config.directory))
    if any(run.workspace.record(earlier) is None for earlier in stage.reads):
        inputs_of(stage, config)  # raises a UserError for the missing input
    if (_is_done(run, config) and not force) or not _first_process(config).wait():
        log.info("%s is done for these settings in %s", stage.name, config.directory)
        return
    if words := _other_settings(run.staged_fingerprint or {"config": {}, "inputs": {}}, stage.name, config):
        raise UserError(
            f"the first process of this training has other settings than this one: {words}; start all processes with"
            " the same config"
        )
    _module(stage).follow(config, run)


def _is_done(run: StageRun, config: Config) -> bool:
    record = run.workspace.record(run.stage)
    redoing = run.workspace.manifest().get("redoing", {})
    return (
        record is not None
        and run.stage not in redoing
        and not _other_settings(record["fingerprint"], run.stage, config)
    )


def _other_settings(fingerprint: Fingerprint, name: str, config: Config) -> str:
    """Text on settings of this process that differ from a fingerprint; empty if none differs."""
    own = fingerprint_of(config.of_stage(name), fingerprint["inputs"])
    return changes(fingerprint, own, Config().of_stage(name))
