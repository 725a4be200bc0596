"""Parts of create-latent-update in several processes of one machine: the result of one, also if some are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from pipeline import ROOT, Run, forked
from test_run_parts import STAGE, copy_of, digest, trained, undisturbed

from census_scvi.census import stream
from census_scvi.cli import main
from census_scvi.cluster.settings import ClusterSection
from census_scvi.cluster.workers import Workers, threads_of_each
from census_scvi.errors import UserError
from census_scvi.files.parts import Part, parts
from census_scvi.model.latent_store import LatentStore
from census_scvi.settings import Config
from census_scvi.stages import workers

__all__ = ["trained", "undisturbed"]  # fixtures
KILLED = "killed by signal 9, probably because the memory of the machine was full"
DO_PART, DO_JOIN = workers.do_part, workers.do_join


def part_of_small_tiles(run_stage: workers.RunStage, name: str, config: Config, part: Part) -> int:
    """A part where rows of tiles have 100 cells; the second and the fifth are killed once, after their first block."""
    stream.X_TILE = 100
    flag = config.directory.parent / f"killed-{part.number}"
    if part.number in (2, 5) and not flag.exists():
        flag.touch()
        append = LatentStore.append
        LatentStore.append = lambda *values: append(*values) or os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment,func-returns-value]  # a planted failure
    return DO_PART(run_stage, name, config, part)


def join_of_small_tiles(run_stage: workers.RunStage, name: str, config: Config) -> int:
    stream.X_TILE = 100
    return DO_JOIN(run_stage, name, config)


def test_three_workers_of_which_two_are_killed(
    trained: Run,
    undisturbed: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = copy_of(trained, tmp_path)
    monkeypatch.setattr(stream, "X_TILE", 100)
    monkeypatch.setattr(workers, "do_part", part_of_small_tiles)
    monkeypatch.setattr(workers, "do_join", join_of_small_tiles)
    assert run(STAGE, "cluster.workers=3", "cluster.parts_per_worker=2") == 0
    said = capsys.readouterr().err
    for part in ("part 2 of 6", "part 5 of 6"):
        assert f"{part} is done again: {KILLED}" in said
    assert digest(run) == undisturbed
    assert run.record(STAGE)["parts"] == 6
    logs = run.path(f"logs/{STAGE}")
    assert len(list(logs.iterdir())) == 6
    assert "part 3 of 6 of create-latent-update is done" in (logs / "part-00003-of-00006.log").read_text()
    assert run(STAGE) == 0
    assert "create-latent-update is done for these settings" in capsys.readouterr().err
    assert run(STAGE, "cluster.workers=2", "--force") == 0  # again, in other parts
    assert digest(run) == undisturbed
    assert run.record(STAGE)["parts"] == 2


@pytest.mark.parametrize(
    ("settings", "n_cells", "n_parts"),
    [
        ({"workers": 3}, 2_000, 3),
        ({"workers": 3}, 700_000, 7),
        ({"workers": 3}, 10**8, 12),
        ({"workers": 3, "parts_per_worker": 5}, 2_000, 15),
        ({"address": "local"}, 2_000, 2),
        ({"address": "local"}, 10**8, 4),
    ],
)
def test_a_small_census_has_few_parts(settings: dict[str, object], n_cells: int, n_parts: int) -> None:
    assert ClusterSection.model_validate(settings).n_parts(n_cells) == n_parts


def test_the_error_of_a_part_is_that_of_the_command(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(trained, tmp_path)
    monkeypatch.setattr(workers, "do_part", fails)
    assert run(STAGE, "cluster.workers=2") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "of 2: the disk is full; its output is in " in line
    assert not run.path("latent.npy").exists()
    run.path(".partial").rename(run.path("aside"))
    assert run(STAGE, "cluster.workers=0") == 2
    assert "cluster.workers" in capsys.readouterr().err


def fails(run_stage: workers.RunStage, name: str, config: Config, part: Part) -> int:
    print("error: the disk is full", file=sys.stderr)
    return 2


def test_a_join_that_fails_or_is_killed(
    trained: Run,
    undisturbed: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = copy_of(trained, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "do_join", failing_join)
        assert run(STAGE, "cluster.workers=2") == 2
        assert "error:" not in capsys.readouterr().err  # the process that joins has printed it
        patch.setattr(workers, "do_join", killed_join)
        assert run(STAGE, "cluster.workers=2") == 2
    assert f"error: the process that joins the parts was {KILLED}; run the same" in capsys.readouterr().err
    assert not run.path("latent.npy").exists()
    assert run(STAGE, "cluster.workers=2") == 0
    assert digest(run) == undisturbed


def test_a_command_that_is_stopped_stops_its_join(trained: Run, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    done = forked(command_with_terminated_join, str(run.config))
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.count("terminated; run the same command again to resume") == 1
    assert "Traceback" not in done.stderr


def command_with_terminated_join(config: str) -> None:
    workers.do_join = terminated_join
    sys.exit(main(STAGE, ["--config", config, "cluster.workers=2"]))


def killed_join(run_stage: workers.RunStage, name: str, config: Config) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def failing_join(run_stage: workers.RunStage, name: str, config: Config) -> int:
    return DO_JOIN(full_disk, name, config)


def full_disk(*_: object) -> None:
    raise UserError("the disk is full")


def terminated_join(run_stage: workers.RunStage, name: str, config: Config) -> int:
    return DO_JOIN(terminates_driver, name, config)


def terminates_driver(*_: object) -> None:
    server = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[1])
    driver = int(Path(f"/proc/{server}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(driver, signal.SIGTERM)
    time.sleep(60)


def test_a_worker_that_is_always_killed_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"part 2 of 3: {KILLED}; its output is in"):
        Workers(partial(killed_or_counted, tmp_path), 2, tmp_path / "logs").do(parts(3), "work")
    assert (tmp_path / "2").read_text() == "xxx"
    assert (tmp_path / "1").read_text() == "x"


def test_a_part_that_hangs_is_done_again(tmp_path: Path) -> None:
    Workers(partial(hangs_once, tmp_path), 2, tmp_path / "logs", minutes=0.2).do(parts(2), "work")
    assert (tmp_path / "2").read_text() == "xx"
    assert (tmp_path / "1").read_text() == "x"


def hangs_once(folder: Path, part: Part) -> int:
    counted = folder / str(part.number)
    with counted.open("a") as file:
        file.write("x")
    if part.number == 2 and counted.read_text() == "x":
        time.sleep(600)
    return 0


def killed_or_counted(folder: Path, part: Part) -> int:
    with (folder / str(part.number)).open("a") as file:
        file.write("x")
    if part.number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    done = forked(killed_driver, tmp_path)
    assert done.returncode == -signal.SIGKILL
    (pid,) = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    raise AssertionError("the worker lives on")


def killed_driver(folder: Path) -> None:
    Workers(partial(kills_driver, folder, os.getpid()), 1, folder / "logs").do(parts(1), "work")


def kills_driver(folder: Path, driver: int, part: Part) -> int:
    (folder / f"pid-{part.number}").write_text(str(os.getpid()))
    os.kill(driver, signal.SIGKILL)
    time.sleep(60)
    return 0


CTRL_C = """
import functools, pathlib, signal, sys
from census_scvi.cluster.process import ForkedProcess
before = signal.getsignal(signal.SIGINT)
work = functools.partial(eval, "int(__import__('signal').getsignal(2) is not __import__('signal').SIG_IGN)")
process = ForkedProcess(work, None, cwd=pathlib.Path())
process.wait()
sys.exit(process.exit_code or int(signal.getsignal(signal.SIGINT) is not before))
"""


def test_ctrl_c_is_for_the_command_alone() -> None:
    """It stops its workers; a server that is importing, and a worker, would print a traceback."""
    assert subprocess.run([sys.executable, "-c", CTRL_C], cwd=ROOT, check=False).returncode == 0


def test_threads() -> None:
    assert threads_of_each(10_000) == 1
    assert threads_of_each(1) == os.cpu_count()
