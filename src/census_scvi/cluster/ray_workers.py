"""Parts as tasks of a Ray cluster: each in a process of its own, on any machine that sees the run directory."""

from __future__ import annotations

import logging
import platform
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from census_scvi.cluster.part_process import PartProcess, PartWork, thread_variables
from census_scvi.cluster.pool import Failure, Pool
from census_scvi.cluster.ray_session import ray_at
from census_scvi.errors import UserError
from census_scvi.files.parts import Part
from census_scvi.terminal.printing import on_one_line

log = logging.getLogger(__name__)

_POLL_SECONDS, _LOOK_SECONDS, _CANCEL_SECONDS = 0.2, 5.0, 5.0
_WITHOUT_MACHINE_SECONDS = 180.0  # a machine that is taken away may be replaced
_DEATHS = {
    OutOfMemoryError: "Ray ended it, because the memory of its machine was full",
    NodeDiedError: "its machine left the Ray cluster",
    WorkerCrashedError: "its process of Ray, or its machine, is gone",
}


@dataclass(frozen=True)
class Outcome:
    """What became of a part: why it failed, or None; the Ray node that did it."""

    failure: Failure | None
    node: str


def do_part(how: PartWork, part: Part) -> Outcome:
    """Do a part; the task of Ray."""
    host, node = platform.node(), ray.get_runtime_context().get_node_id()
    for folder in (how.logs, how.cwd):
        if not folder.is_dir():
            reason = (
                f"{folder} does not exist there: every machine of the Ray cluster must see the run directory and the"
                " current folder under the same path"
            )
            return Outcome(Failure(reason, again=False, host=host), node)
    process = PartProcess(how, part)
    try:
        process.wait()
    finally:
        process.stop()
    failure = process.failure()
    return Outcome(replace(failure, host=host) if failure else None, node)


@contextmanager
def ray_workers(
    address: str,
    work: Callable[[Part], int],
    number: int,
    logs: Path,
    *,
    preload: tuple[str, ...] = (),
    cpus: int = 1,
    gpus: float = 0,
    minutes: float | None = None,
) -> Iterator[RayWorkers]:
    """Connect to Ray while the block runs.

    Parameters
    ----------
    address
        `cluster.address`.
    work, number, logs, preload, minutes
        As in `Workers`.
    cpus, gpus
        Cores, which are the threads as well, and GPUs of a part.

    Raises
    ------
    UserError
        Ray is not reachable, or no longer; or no machine has these cores and GPUs.
    """
    environment = thread_variables(cpus) | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    with ray_at(address):
        try:
            yield RayWorkers(PartWork(work, logs.absolute(), preload, environment, minutes), number, cpus, gpus)
        except (ConnectionError, RayError) as error:
            raise UserError(
                f"cluster.address {address}: the connection to Ray was lost ({on_one_line(str(error))}); run the same"
                " command again, which resumes"
            ) from None


class RayWorkers(Pool[Any]):
    """Tasks of the connected Ray cluster that do parts, see `Pool.do`; made by `ray_workers`."""

    def __init__(self, how: PartWork, number: int, cpus: int, gpus: float) -> None:
        self.how, self.number, self.logs, self.cpus, self.gpus = how, number, how.logs, cpus, gpus
        # A task that dies is not started by Ray again, but by the pool, which says so and counts.
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(do_part)
        self._failed_on: dict[Part, set[str]] = defaultdict(set)
        self._looked = self._fitted = time.monotonic()
        nodes = [node["Resources"] for node in self._nodes()]
        room = sum(self._room(node) for node in nodes)
        log.info(
            "Ray cluster with %g CPUs and %g GPUs: room for %d parts at the same time, cluster.workers is %d",
            sum(node.get("CPU", 0) for node in nodes),
            sum(node.get("GPU", 0) for node in nodes),
            room,
            number,
        )
        if not room:
            raise self._no_machine()

    def _start(self, part: Part) -> Any:
        return self._task.options(scheduling_strategy=self._elsewhere(part)).remote(self.how, part)

    def _elsewhere(self, part: Part) -> Any:
        """Where a part is started: on another machine than those on which it failed, if there is one."""
        failed = self._failed_on[part]
        nodes = [node["NodeID"] for node in self._nodes() if self._room(node["Resources"])] if failed else []
        others = [node for node in nodes if node not in failed]
        return NodeAffinitySchedulingStrategy(others[part.number % len(others)], soft=True) if others else "DEFAULT"

    def _ended(self, running: Mapping[Any, Part]) -> dict[Any, Failure | None]:
        # Without waiting in Ray, which would lose the exceptions of handlers of signals.
        ready, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
        if not ready:
            time.sleep(_POLL_SECONDS)
            self._require_machine()
        return {task: self._failure(running[task], task) for task in ready}

    def _failure(self, part: Part, task: Any) -> Failure | None:
        try:
            outcome = ray.get(task)
        except RayTaskError as error:
            text, address = str(error).strip(), re.search(r"\bip=([\w.:]+)", str(error))
            last = on_one_line(text.splitlines()[-1])
            words = f"{last}; every machine of the Ray cluster needs the same installation as this one"
            return Failure(words, again=False, host=address and address[1])
        except RayError as error:
            known = (text for kind, text in _DEATHS.items() if isinstance(error, kind))
            return Failure(next(known, on_one_line(str(error))), again=True)
        if outcome.failure is not None:
            self._failed_on[part].add(outcome.node)
        failure: Failure | None = outcome.failure
        return failure

    def _stop(self, running: Sequence[Any]) -> None:
        with suppress(RayError, ConnectionError):  # the cluster may be gone
            for task in running:
                ray.cancel(task, force=True)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_CANCEL_SECONDS)

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in ray.nodes() if node["Alive"]]

    def _room(self, resources: Mapping[str, float]) -> int:
        """Number of parts for which a machine has room."""
        by_cpus = int(resources.get("CPU", 0) // self.cpus)
        return min(by_cpus, int(resources.get("GPU", 0) / self.gpus)) if self.gpus else by_cpus

    def _require_machine(self) -> None:
        """UserError if no machine has room for a part, and for some minutes none had."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        if any(self._room(node["Resources"]) for node in self._nodes()):
            self._fitted = now
        elif now - self._fitted > _WITHOUT_MACHINE_SECONDS:
            raise self._no_machine()

    def _no_machine(self) -> UserError:
        most = {
            name: max((node["Resources"].get(name, 0) for node in self._nodes()), default=0) for name in ("CPU", "GPU")
        }
        return UserError(
            f"a part needs {self.cpus} CPUs and {self.gpus:g} GPUs (cluster.cpus_per_worker, cluster.gpus_per_worker),"
            f" and no machine of the Ray cluster has them: the most are {most['CPU']:g} CPUs and {most['GPU']:g} GPUs;"
            " lower them, or add a machine"
        )
