"""kill -9 and signals to stop in each stage, a full disk, two runs at once: nothing is lost, a rerun ends the same."""

import errno
import hashlib
import os
import pkgutil
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import pytest
import torch
from pipeline import ROOT, STAGES, Run, forked, run_script

from census_scvi.cli import main
from census_scvi.model.safe import load_safe
from census_scvi.stages import demo

# Each plants a signal, kill -9 by default, at the nth call of a function of the stage.
KILL = """
import os, signal
import {module} as module
calls = [0]
real = module.{name}
def dying(*a, **k):
    calls[0] += 1
    if calls[0] == {nth}:
        os.kill(os.getpid(), signal.{signal})
    return real(*a, **k)
module.{name} = dying
"""
POINTS = {
    "prepare while it writes cells": ("prepare", "census_scvi.stages.prepared_cells", "H5adWriter.append", 1),
    "prepare in its commit": ("prepare", "census_scvi.workspace.run", "Workspace.finish_commit", 1),
    "train in an epoch": ("train", "census_scvi.training.finite_loss", "FiniteLoss.on_train_batch_end", 12),
    "train while it saves": ("train", "census_scvi.stages.train", "save_safe", 1),
    "latent in its third block": ("create-latent-update", "census_scvi.model.latent_store", "LatentStore.append", 3),
    "latent while it writes the minified model": (
        "create-latent-update",
        "census_scvi.model.minified",
        "H5adWriter.append",
        2,
    ),
}


def digests(run: Run) -> dict[str, Any]:
    """What the stages made, without what holds times (manifest, model.pt's zip)."""
    found: dict[str, Any] = {}
    for name in ("hv_genes.pkl", "latent.npy", "latent-idx.npy", "scvi.model/weights.safetensors"):
        found[name] = hashlib.sha256(run.path(name).read_bytes()).hexdigest()
    for name in ("anndata_model.h5ad", "final_scvi_optimized/adata.h5ad"):
        cells = ad.read_h5ad(run.path(name))
        found[name] = (cells.obs.to_csv(), cells.X.data.tobytes(), cells.X.indices.tobytes(), sorted(cells.obsm))
    return found


@pytest.fixture(scope="module")
def undisturbed(finished_run: Run) -> Run:
    return finished_run


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_kill_9_and_a_rerun_end_like_an_undisturbed_run(
    point: str, undisturbed: Run, demo_census: str, tmp_path: Path
) -> None:
    stage, module, name, nth = POINTS[point]
    run = Run(tmp_path, demo_census)
    for earlier in STAGES[: STAGES.index(stage)]:
        assert run(earlier) == 0
    names_before = {path.name for path in run.directory.iterdir()} if run.directory.exists() else set()
    killed = run.subprocess(stage, before=KILL.format(module=module, name=name, nth=nth, signal="SIGKILL"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if "commit" not in point:
        left = {path.name for path in run.directory.iterdir()} - names_before
        assert left <= {".lock", ".partial", "manifest.json", "tb_logs"}, "half-written artifacts stand in their place"
    for later in STAGES[STAGES.index(stage) :]:
        assert run(later) == 0
    assert digests(run) == digests(undisturbed)


# --- signals to stop

STOPPED = {
    "SIGINT": (130, "interrupted; run the same command again to resume"),
    "SIGTERM": (143, "terminated; run the same command again to resume"),
    "SIGHUP": (129, "terminated, because its terminal was closed; run the same command again to resume"),
}
STOPS = [
    ("prepare", "census_scvi.census.open.open_census", "SIGHUP"),
    ("prepare", "census_scvi.counts.writer.H5adWriter.append", "SIGTERM"),
    ("train", "census_scvi.stages.train.fit", "SIGTERM"),
    ("train", "census_scvi.training.finite_loss.FiniteLoss.on_train_batch_end", "SIGHUP"),
    ("train", "census_scvi.training.finite_loss.FiniteLoss.on_train_epoch_end", "SIGINT"),
    ("train", "census_scvi.training.finite_loss.FiniteLoss.on_train_epoch_end", "SIGTERM"),
    ("train", "census_scvi.stages.train.save_safe", "SIGTERM"),
    ("create-latent-update", "census_scvi.model.latent_store.LatentStore.append", "SIGTERM"),
    ("create-latent-update", "census_scvi.model.minified.H5adWriter.append", "SIGINT"),
    ("publish", "census_scvi.census.open.open_census", "SIGTERM"),
    ("evaluate", "census_scvi.census.open.open_census", "SIGTERM"),
]


@contextmanager
def signal_at(place: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Send this process a signal when it next calls a function."""
    module, _, function = place.rpartition(".")
    owner: Any = pkgutil.resolve_name(module)
    real = getattr(owner, function)

    def signalling(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), getattr(signal, name))
        return real(*arguments, **options)

    with monkeypatch.context() as planted:
        planted.setattr(owner, function, signalling)
        yield


def require_stopped(exit_code: int, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = STOPPED[name]
    assert exit_code == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == line
    assert not any(text.startswith(("error", "Traceback")) or "SIGTERM" in text for text in lines)


@pytest.fixture
def heeds_signals() -> Iterator[None]:
    """Signals act in the test, whatever nohup or a shell in the background told this process to ignore."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("heeds_signals")
@pytest.mark.parametrize(("stage", "place", "name"), STOPS, ids=[f"{stop[1][12:]} {stop[2]}" for stop in STOPS])
def test_a_stopped_stage_says_so_and_what_it_was_to_replace_is_not_its_result(
    stage: str,
    place: str,
    name: str,
    undisturbed: Run,
    demo_census: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Run(tmp_path, demo_census)
    shutil.copytree(undisturbed.directory, run.directory)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with signal_at(place, name, monkeypatch):
        require_stopped(run(stage, "--force"), name, capsys)
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert load_safe(run.path("scvi.model"))  # what was there is whole
    for later in (
        [*STAGES, "publish"][STAGES.index(stage) + 1 :] if stage in STAGES and "open_census" not in place else ()
    ):
        assert run(later) == 2
        assert f"scvi-{stage}.py --force did not finish in" in capsys.readouterr().err


def test_a_stopped_force_goes_on_without_it(
    undisturbed: Run,
    demo_census: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.set_num_threads(1)
    run = Run(tmp_path, demo_census)
    shutil.copytree(undisturbed.directory, run.directory)
    with signal_at("census_scvi.stages.train.save_safe", "SIGTERM", monkeypatch):
        require_stopped(run("train", "--force"), "SIGTERM", capsys)
    shutil.copytree(run.directory, tmp_path / "stopped")
    assert run("train") == 0
    assert "resuming from the last checkpoint" in capsys.readouterr().err
    assert run.record("train")["resumed"]
    assert "redoing" not in run.manifest() or not run.manifest()["redoing"]
    for later in STAGES[2:]:
        assert run(later) == 0
    assert digests(run) == digests(undisturbed)


def test_the_settings_of_the_result_that_stands_make_it_the_result_again(
    undisturbed: Run,
    demo_census: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Run(tmp_path, demo_census)
    shutil.copytree(undisturbed.directory, run.directory)
    with signal_at("census_scvi.stages.train.fit", "SIGTERM", monkeypatch):
        assert run("train", "--force", "train.max_epochs=7") == 143
    assert run("create-latent-update") == 2
    assert run("train", "train.max_epochs=9") == 2
    assert "train.max_epochs was 3 and is 9" in capsys.readouterr().err
    assert run("train") == 0
    assert "train is done for these settings" in capsys.readouterr().err
    assert run("create-latent-update") == 0
    assert digests(run) == digests(undisturbed)


STUCK = """
import hashlib, os, signal, sys, threading
from census_scvi.terminal import guarded, stopping
stopping._GRACE_SECONDS = 0.2
def work():
    threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes within one call, during which Python handles no signal
sys.exit(guarded.guarded(work))
"""


def test_a_call_that_does_not_return_is_left() -> None:
    stuck = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, check=False, timeout=60)
    assert (stuck.returncode, stuck.stderr) == (143, STOPPED["SIGTERM"][1] + "\n")


IGNORED = """
import os, signal, sys
from census_scvi.terminal.guarded import guarded
signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.exit(guarded(lambda: os.kill(os.getpid(), signal.SIGHUP)))
"""


def test_nohup_keeps_its_promise() -> None:
    assert subprocess.run([sys.executable, "-c", IGNORED], check=False).returncode == 0


@pytest.mark.parametrize("command", ["verify", "build_census", "map_query", "demo"])
def test_what_is_no_stage_stops_alike(
    command: str, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "build.yaml").write_text("{uri: new, datasets: [{file: a.h5ad, organism: homo_sapiens}]}")
    call, place = {
        "verify": (lambda: main("verify", [str(tmp_path)]), "publication.chain.fetch"),
        "build_census": (
            lambda: main("build-census", [str(tmp_path / "build.yaml")]),
            "stages.build_census.build_from_config",
        ),
        "map_query": (lambda: undisturbed("map-query", "query.file=a.h5ad"), "stages.protocol.run_stage"),
        "demo": (lambda: demo.run_demo([]), "stages.protocol.run_stage"),
    }[command]
    monkeypatch.setattr(demo, "_build_census", lambda config: None)
    monkeypatch.setattr(demo, "write_own_cells", lambda *_: None)
    monkeypatch.chdir(ROOT)
    with signal_at(f"census_scvi.{place}", "SIGTERM", monkeypatch):
        if command == "demo":  # a stage within it has said so
            with pytest.raises(SystemExit) as stopped:
                call()
            require_stopped(stopped.value.code, "SIGTERM", capsys)
        else:
            require_stopped(call(), "SIGTERM", capsys)


def fails_with_full_disk(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, nth: int) -> None:
    real, calls = getattr(owner, name), [0]

    def full(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, full)


@pytest.mark.parametrize(
    ("stage", "owner", "name", "nth"),
    [
        ("prepare", h5py.Dataset, "resize", 30),
        ("train", torch, "save", 2),
        ("create-latent-update", os, "fsync", 9),
    ],
    ids=["prepare", "train", "latent"],
)
def test_a_full_disk_is_one_line_and_the_rerun_ends_the_same(
    stage: str,
    owner: Any,
    name: str,
    nth: int,
    undisturbed: Run,
    demo_census: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.set_num_threads(1)
    run = Run(tmp_path, demo_census)
    for earlier in STAGES[: STAGES.index(stage)]:
        assert run(earlier) == 0
    with monkeypatch.context() as planted:
        fails_with_full_disk(planted, owner, name, nth)
        assert run(stage) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "the disk is full" in errors[0]
    for later in STAGES[STAGES.index(stage) :]:
        assert run(later) == 0
    assert digests(run) == digests(undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs root and the right to mount: run the tests as root, in a container that has it")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [8, 60, 420, 900, 1180, 4090])
def test_a_disk_that_is_too_small_for_the_cells(
    kilobytes: int, demo_census: str, small_disk: Path, tmp_path: Path
) -> None:
    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(small_disk)], check=True)

    run = Run(tmp_path, demo_census)
    resize(kilobytes)
    setting = f"output.directory={small_disk}/run"
    failed = run.subprocess("prepare", setting)
    assert failed.returncode == 2, failed.stderr
    (error,) = [line for line in failed.stderr.splitlines() if line.startswith("error")]
    assert "the disk is full" in error
    assert f" MB in {small_disk}/run" in error
    resize(100_000)
    done = run.subprocess("prepare", setting)
    assert done.returncode == 0, done.stderr
    assert ad.read_h5ad(small_disk / "run" / "anndata_model.h5ad").n_obs > 1000


def test_no_permission_is_one_line(demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere: run the test as another user")
    tmp_path.chmod(0o500)
    assert Run(tmp_path / "x", demo_census)("prepare") == 2
    assert "no permission" in capsys.readouterr().err


@pytest.mark.slow
def test_two_runs_on_one_directory(demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, demo_census)
    number = tmp_path / "number"
    wait = (
        "import os, pathlib, time, census_scvi.stages.prepare as p; p.select_genes = lambda *a:"
        f" (pathlib.Path({str(number)!r}).symlink_to(str(os.getpid())), time.sleep(60))"
    )
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run.subprocess, "prepare", before=wait)
        while not number.is_symlink():
            assert not first.done(), first.result().stderr
            time.sleep(0.01)
        process = int(str(number.readlink()))
        try:
            assert run("prepare") == 2
            assert f"is in use by scvi-prepare.py (process {process} on" in capsys.readouterr().err
        finally:
            os.kill(process, signal.SIGKILL)
    assert first.result().returncode == -signal.SIGKILL
    assert run("prepare") == 0


DDP = {
    "max_epochs": 2,
    "batch_size": 32,
    "checkpoint_minutes": 0,
    "multi_gpu": True,
    "devices": 2,
    "accelerator": "cpu",
}


def start(script: Path, run: Run) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), "--config", str(run.config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def as_launched(script: Path, run: Run) -> list[subprocess.CompletedProcess[str]]:
    """The script in two forks, in the environment of the processes that Lightning starts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])

    def process(rank: int) -> subprocess.CompletedProcess[str]:
        variables = {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return forked(run_script, str(script), "--config", str(run.config), **variables)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, (0, 1)))


# On each of two processes another library is faster; each says which one it uses.
UNLIKE = """
import os, sys
from census_scvi.training.fast import plan
rank, use = os.environ.get("LOCAL_RANK", "0"), plan.products.use
plan.faster_libraries = lambda *_: plan.Libraries(*[{"0": "onednn", "1": "torch"}[rank]] * 3)
plan.products.use = lambda libraries: print(f"rank {rank} uses {libraries.forward}", file=sys.stderr) or use(libraries)
"""
TRAIN = "\nimport sys\nfrom census_scvi.cli import main\nsys.exit(main('train'))\n"


@pytest.mark.slow
def test_two_cpu_processes_train_one_model_and_resume(demo_census: str, tmp_path: Path) -> None:
    """DDP as an operator starts it: the script, with multi_gpu; and once more, killed in an epoch and resumed."""
    undisturbed, killed = (Run(tmp_path / name, demo_census, train=DDP) for name in ("undisturbed", "killed"))
    assert undisturbed("prepare") == 0
    script = tmp_path / "undisturbed.py"
    script.write_text(UNLIKE + TRAIN)
    done = as_launched(script, undisturbed)
    assert [process.returncode for process in done] == [0, 0], done
    assert {line for process in done for line in process.stderr.splitlines() if " uses " in line} == {
        "rank 0 uses onednn",
        "rank 1 uses onednn",
    }
    record = undisturbed.record("train")
    assert record["processes"] == 2
    assert record["libraries"]["forward"] == "onednn"
    assert record["counts"]["epochs"] == 2
    assert record["learning_curves"]["elbo_validation"][-1] < record["learning_curves"]["elbo_validation"][0]

    assert killed("prepare") == 0
    script = tmp_path / "dying.py"
    kill = {"module": "census_scvi.training.finite_loss", "name": "FiniteLoss.on_train_batch_end", "nth": 19}
    first = "os.environ.get('LOCAL_RANK', '0') == '0'"  # the signal comes to one of the processes only
    plant = KILL.format(**kill, signal=f"SIGTERM if {first} else 0")
    script.write_text(UNLIKE + plant + TRAIN)
    stopped = start(script, killed)
    assert stopped.returncode == 143, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == STOPPED["SIGTERM"][1]
    assert "Traceback" not in stopped.stderr
    checkpoint = torch.load(killed.path(".partial/train/checkpoint.ckpt"), weights_only=True)
    first, second = (state["random"]["cpu"] for state in checkpoint["processes"])
    assert not torch.equal(first, second)  # each process draws its own noise
    resumed = as_launched(ROOT / "scvi-train.py", killed)
    assert [process.returncode for process in resumed] == [0, 0], resumed
    weights = [load_safe(run.path("scvi.model"))[0].module.state_dict() for run in (undisturbed, killed)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert undisturbed("create-latent-update") == 0


def test_a_minified_folder_in_the_way_is_replaced_whole(undisturbed: Run, demo_census: str, tmp_path: Path) -> None:
    run = Run(tmp_path, demo_census)
    shutil.copytree(undisturbed.directory, run.directory)
    (run.path("final_scvi_optimized") / "stray").touch()
    assert run("create-latent-update", "--force") == 0
    assert not (run.path("final_scvi_optimized") / "stray").exists()
