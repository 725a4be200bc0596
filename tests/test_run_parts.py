"""create-latent-update in parts, each a command: any order, at the same time, killed; the result is that of one run."""

import hashlib
import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline import Run

from census_scvi.census import stream
from census_scvi.config.run_names import LOCK
from census_scvi.files.lock import directory_lock
from census_scvi.files.parts import Part
from census_scvi.workspace import staged_parts

STAGE = "create-latent-update"
# 1,500 cells are one row of tiles: rows of 100 cells make parts of it.
SMALL_TILES = "from census_scvi.census import stream; stream.X_TILE = 100"
# Ends the process after its first block, like kill -9.
KILL = """
import os, signal
from census_scvi.model.latent_store import LatentStore
append = LatentStore.append
LatentStore.append = lambda self, *values: append(self, *values) or os.kill(os.getpid(), signal.SIGKILL)
"""
# Ends the process between two steps of the join.
KILL_JOIN = """
import os, signal
from census_scvi.model.latent_store import LatentStore
{step} = LatentStore.{step}
LatentStore.{step} = lambda self, *values: {step}(self, *values) or os.kill(os.getpid(), signal.SIGKILL)
"""


def digest(run: Run) -> str:
    """Hash of the embedding and the counts by soma_joinid, and of the minified model's data."""
    joinids = np.load(run.path("latent-idx.npy"))
    order = np.argsort(joinids)
    values = [joinids[order], *(np.load(run.path(f"{name}.npy"))[order] for name in ("latent", "latent-hash"))]
    minified = run.path("final_scvi_optimized/adata.h5ad").read_bytes()
    return hashlib.sha256(b"".join([*(value.tobytes() for value in values), minified])).hexdigest()


@pytest.fixture(scope="module")
def trained(finished_run: Run, demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run directory in which only the embedding is missing."""
    folder = tmp_path_factory.mktemp("trained")
    run = Run(folder, demo_census, latent={"block_size": 100})
    ignored = shutil.ignore_patterns("latent*", "final_scvi_optimized", ".partial", LOCK)
    shutil.copytree(finished_run.directory, run.directory, ignore=ignored)
    manifest = json.loads(run.path("manifest.json").read_text())
    del manifest["stages"][STAGE]
    run.path("manifest.json").write_text(json.dumps(manifest))
    return run


def copy_of(trained: Run, folder: Path) -> Run:
    """The run directory and its config in another folder."""
    folder.mkdir(exist_ok=True)
    return Run.given(folder, yaml.safe_load(trained.config.read_text()), trained.directory)


def embedded(run: Run, part: str | None = None, *, before: str = "") -> int:
    """The command, or a part of it, in a process of its own; returns its exit code."""
    done = run.subprocess(STAGE, *(["--part", part] if part else []), before=f"{SMALL_TILES}\n{before}")
    return done.returncode


@pytest.fixture(scope="module")
def undisturbed(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    run = copy_of(trained, tmp_path_factory.mktemp("undisturbed"))
    assert embedded(run) == 0
    assert not run.path(".partial").exists() or not any(run.path(".partial").iterdir())
    return digest(run)


def test_seven_parts_from_the_last_to_the_first_of_which_two_are_killed(
    trained: Run, undisturbed: str, tmp_path: Path
) -> None:
    run = copy_of(trained, tmp_path)
    for number in range(7, 0, -1):
        killed = number in (2, 5)
        assert embedded(run, f"{number}/7", before=KILL if killed else "") == (-signal.SIGKILL if killed else 0)
    assert embedded(run, "5/7") == 0  # the other one is finished by the stage itself
    assert not run.path("latent.npy").exists()
    assert embedded(run) == 0
    assert digest(run) == undisturbed
    assert run.record(STAGE)["parts"] == 7
    counts = run.record(STAGE)["counts"]
    assert counts["cells"] == 1500
    assert 0 <= counts["largest_difference_to_scvi_tools"] < 1e-5
    assert embedded(run, "3/7") == 0  # is done


def test_parts_at_the_same_time_on_machines_that_see_the_directory(
    trained: Run, undisturbed: str, tmp_path: Path
) -> None:
    run = copy_of(trained, tmp_path)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda number: embedded(run, f"{number}/3"), (1, 2, 3))) == [0, 0, 0]
    assert embedded(run) == 0
    assert digest(run) == undisturbed


@pytest.mark.parametrize("step", ["fill_from", "remove"])
def test_a_killed_join_is_done_again(step: str, trained: Run, undisturbed: str, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    assert embedded(run, "1/2") == embedded(run, "2/2") == 0
    assert embedded(run, before=KILL_JOIN.format(step=step)) == -signal.SIGKILL
    assert embedded(run) == 0
    assert digest(run) == undisturbed


@pytest.mark.slow
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), of=st.integers(1, 9))
def test_any_order_and_any_kill(data: st.DataObject, of: int, trained: Run, undisturbed: str, tmp_path: Path) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    run = copy_of(trained, folder)
    numbers = data.draw(st.lists(st.integers(1, of), max_size=4))
    killed = data.draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)))
    for number, kill in zip(numbers, killed, strict=True):
        assert embedded(run, f"{number}/{of}", before=KILL if kill else "") in ((0, -signal.SIGKILL) if kill else (0,))
    assert embedded(run) == 0
    assert digest(run) == undisturbed


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("5/4", "argument --part: part 5 of 4 does not exist; expected 1 to 4"),
        ("1/0", "argument --part: part 1 of 0 does not exist"),
        ("two", "argument --part: 'two' is no part; expected I/N, e.g. 2/8"),
    ],
)
def test_wrong_parts(part: str, message: str, finished_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        finished_run(STAGE, "--part", part)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_what_does_not_fit_is_refused(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--force, another number of parts, other settings and versions, what another process does."""
    run = copy_of(trained, tmp_path)
    monkeypatch.setattr(stream, "X_TILE", 100)

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert run(STAGE, *arguments) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        return line

    assert "--force starts a stage again and --part does a part of it" in refused("--part", "1/2", "--force")
    assert run(STAGE, "--part", "1/2") == 0
    files = {path: path.read_bytes() for path in run.path(f".partial/{STAGE}").iterdir() if path.is_file()}
    assert "holds a create-latent-update in 2 parts, and this is part 1 of 3; run its parts 1 to 2" in refused(
        "--part", "1/3"
    )
    assert "holds an unfinished create-latent-update for other settings than part 2 of 2: latent.block_size was" in (
        refused("--part", "2/2", "latent.block_size=64")
    )
    assert "holds an unfinished create-latent-update for other settings: latent.block_size was 100" in refused(
        "latent.block_size=64"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staged_parts, "package_versions", lambda: {"torch": "1.0"})
        for arguments in (("--part", "2/2"), ()):
            line = refused(*arguments)
            assert "were done with other versions: " in line
            assert "torch 2" in line
            assert ", here 1.0" in line
    with directory_lock(run.path(LOCK), "scvi-create-latent-update.py"):
        assert "is in use by scvi-create-latent-update.py (process" in refused("--part", "2/2")
    with directory_lock(run.path(LOCK), "scvi-create-latent-update.py --part", shared=True):
        assert "is in use by scvi-create-latent-update.py --part (process" in refused()
    with directory_lock(run.path(f".partial/{STAGE}/{Part(2, 2).name('part.lock')}"), "another process"):
        assert "is in use by another process" in refused("--part", "2/2")
    kept = {path: path.read_bytes() for path in run.path(f".partial/{STAGE}").iterdir() if path in files}
    assert kept == files


def test_an_unfinished_run_is_not_divided_into_parts(trained: Run, undisturbed: str, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    assert embedded(run, before=KILL) == -signal.SIGKILL
    done = run.subprocess(STAGE, "--part", "1/2", before=SMALL_TILES)
    assert done.returncode == 2
    assert "holds an unfinished create-latent-update that is not divided into parts" in done.stderr
    assert embedded(run) == 0
    assert digest(run) == undisturbed


def test_other_commands_have_no_parts(finished_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finished_run("train", "--part", "1/2")
    assert "unrecognized arguments: --part" in capsys.readouterr().err
