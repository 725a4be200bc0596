"""How every stage runs: lock, inputs, done or refused or resumed, then its work, then its record.

Nothing heavy is imported before it is known that there is work to do.
"""

from __future__ import annotations

import importlib
import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from census_scvi.config.stages import STAGES, Stage
from census_scvi.files.uri import without_credentials
from census_scvi.query.places import query_results
from census_scvi.report.named import evaluation_setting
from census_scvi.settings import Config
from census_scvi.stages.inputs import inputs_of
from census_scvi.stages.plan import Plan
from census_scvi.workspace import Artifacts, Workspace
from census_scvi.workspace.beside import Beside

if TYPE_CHECKING:
    from census_scvi.census.open import Census

log = logging.getLogger(__name__)

# As Lightning reads them: the number of this process among those that train together.
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


@dataclass
class Task:
    """Inputs and places of a stage's work.

    Attributes
    ----------
    config
        Its settings.
    artifacts
        Names of files and folders in the run directory.
    run
        Where it writes, whether it resumes; `start` it before anything is written.
    place
        The place of its results, which this process has locked.
    census
        The open `Census`, for a stage whose inputs it is among; else None.
    """

    config: Config
    artifacts: Artifacts
    run: Any  # StageRun, or BesideRun of map-query
    place: Any  # Workspace, or Beside of map-query
    census: Any

    @property
    def directory(self) -> Path:
        """The folder of its results."""
        return Path(self.place.directory)

    def commit(self, artifacts: list[str], counts: dict[str, Any], **details: Any) -> None:
        """Move the written files to their places, and record the stage as done; see `StageRun.commit`."""
        config = without_credentials(self.config.model_dump(mode="json"))
        self.run.commit(artifacts, counts, config=config, seed=self.config.seed, **details)


def run_stage(name: str, config: Config, *, force: bool = False) -> None:
    """Run a stage unless it is done for these settings.

    Raises
    ------
    UserError
        Its place is in use, or holds results of other settings or inputs; or the stage's own errors.
    """
    stage = STAGES[name]
    if stage.several_processes and is_follower():
        _module(stage).follow(config)
        return
    place, new = _place(stage, config)
    with ExitStack() as stack:
        stack.enter_context(place.locked(name, new=new))
        census = _open_census(stage, config, stack)
        run = place.begin(
            name,
            config.of_stage(name),
            inputs_of(stage, config, census),
            force=force,
            progress=stage.progress,
            defaults=Config().of_stage(name),
        )
        if run.done:
            if name == "publish":
                _require_published(config, place, census)
            log.info("%s is done for these settings in %s; --force runs it again", name, place)
            return
        try:
            _module(stage).run(Task(config, config.artifacts, run, place, census))
        finally:
            if stage.progress is None:
                run.discard()


def plan_stage(name: str, config: Config) -> Plan:
    """The plan of a stage; changes nothing."""
    plan: Plan = _module(STAGES[name]).plan(config)
    return plan


def _place(stage: Stage, config: Config) -> tuple[Workspace | Beside, bool]:
    """The place of the results, and whether the folder may be new."""
    if stage.name == "map-query":
        return query_results(config.query, config.directory), False
    if stage.name == "evaluate":
        return Workspace(config.evaluation_folder, evaluation_setting(config.evaluate)), True
    return Workspace(config.directory), not stage.reads


def _open_census(stage: Stage, config: Config, stack: ExitStack) -> Census | None:
    if not stage.reads_census:
        return None
    from census_scvi.census.open import open_census

    return stack.enter_context(open_census(config.census))


def _require_published(config: Config, workspace: Any, census: Any) -> None:
    """UserError where what a finished run published is there no longer."""
    from census_scvi.publication import target

    publication = str((workspace.whole_record("publish") or {}).get("publication"))
    target.require_published(config.publish, target.experiment_uri(config.publish, census), publication)


def _module(stage: Stage) -> Any:
    return importlib.import_module(stage.module)


def is_follower() -> bool:
    """Whether this process is one of several of a training and not the first, which keeps the run directory."""
    return any(os.environ.get(name, "0").isdecimal() and int(os.environ.get(name, "0")) > 0 for name in _RANKS)
