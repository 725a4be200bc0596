"""Work that tests of Ray give to its processes; those import this file, which is quick."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from census_scvi.files.parts import Part
from census_scvi.settings import Config
from census_scvi.stages import protocol, workers
from census_scvi.terminal.guarded import guarded

# Set in Ray's processes; tells the nodes of one machine apart.
NODE = "RAY_RAYLET_PID"


def noted(folder: Path, part: Part) -> int:
    """Appends the node to a file of the part."""
    with (folder / str(part.number)).open("a") as file:
        file.write(f"{os.environ[NODE]}\n")
    return 0


def dies_and_hangs(folder: Path, part: Part) -> int:
    """Part 2 kills Ray's process when it is tried for the first time, and hangs for the third time."""
    noted(folder, part)
    tries = len((folder / str(part.number)).read_text().split())
    if part.number == 2 and tries in (1, 3):
        if tries == 1:
            kill_ray_process()
        time.sleep(600)
    return 0


def kill_ray_process() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)


def fails(folder: Path, part: Part) -> int:
    noted(folder, part)
    if part.number == 2:
        print("error: there is no column of that name", file=sys.stderr)
        return 2
    return 0


def fills_the_disk(part: Part) -> int:
    """The disk is full, also for the error."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)

    def work() -> NoReturn:
        raise OSError(28, "No space left on device")

    return guarded(work)


def sleeps(folder: Path, part: Part) -> int:
    (folder / f"pid-{part.number}").write_text(str(os.getpid()))
    time.sleep(600)
    return 0


def of_another_installation(packages: Path, config: Config, part: Part) -> int:
    """A part of create-latent-update where other packages are installed."""
    sys.path.insert(0, str(packages))
    return workers.do_part(protocol.run_stage, "create-latent-update", config, part)


def of_small_tiles(run_stage: workers.RunStage, name: str, config: Config, part: Part) -> int:
    """A part where rows of tiles have 100 cells; after its first block it does what a file next to the run says."""
    from census_scvi.census import stream
    from census_scvi.model.latent_store import LatentStore

    stream.X_TILE = 100
    orders, append = config.directory.parent, LatentStore.append

    def append_and_obey(*values: object) -> None:
        append(*values)  # type: ignore[arg-type]  # passed on as they are
        if taken(orders / f"kill-{part.number}"):
            kill_ray_process()
        elif taken(orders / f"hold-{part.number}"):
            (orders / f"holding-{part.number}").write_text(os.environ[NODE])
            time.sleep(600)

    LatentStore.append = append_and_obey  # type: ignore[method-assign,assignment]  # a planted failure
    return workers.do_part(run_stage, name, config, part)


def taken(order: Path) -> bool:
    """Whether the file was there; it is removed."""
    if order.exists():
        order.unlink()
        return True
    return False
