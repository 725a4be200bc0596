"""Parts on a Ray cluster: the result of one process, whatever dies; errors are one line."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray_parts
from pipeline import ROOT, Run, forked
from ray.cluster_utils import Cluster
from test_run_parts import STAGE, copy_of, digest, trained, undisturbed

from census_scvi.census import stream
from census_scvi.cli import main
from census_scvi.cluster.ray_session import ray_at
from census_scvi.cluster.ray_workers import ray_workers
from census_scvi.config.run_names import LOGS
from census_scvi.errors import UserError
from census_scvi.files.parts import Part, parts
from census_scvi.settings import load_config
from census_scvi.stages import workers
from census_scvi.terminal.guarded import guarded

__all__ = ["trained", "undisturbed"]  # fixtures
SMALL = 80_000_000  # bytes of an object store: the least that Ray accepts


@pytest.fixture(scope="module")
def started() -> Iterator[Cluster]:
    """A head without CPUs; its files and the note of its address are not those of other Ray clusters here."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # paths of sockets must be short
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
            "OMP_NUM_THREADS": "1",
        }.items():
            patch.setenv(name, value)
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": SMALL}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield cluster
        finally:
            cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(started: Cluster) -> Cluster:
    """The head, and two nodes of one CPU."""
    while len(started.worker_nodes) < 2:
        started.add_node(num_cpus=1, object_store_memory=SMALL, wait=False)
    started.wait_for_nodes(60)
    return started


def done(cluster: Cluster, work: Callable[[Part], int], folder: Path, n_parts: int = 3, **how: Any) -> None:
    """Do parts, two at a time."""
    with ray_workers(cluster.address, work, 2, folder / "logs", **how) as pool:
        pool.do(parts(n_parts), "work")


def nodes_of(folder: Path, number: int) -> list[str]:
    """The node of each try of a part."""
    return (folder / str(number)).read_text().split()


def test_a_part_that_hangs_or_whose_worker_dies_is_done_again(cluster: Cluster, tmp_path: Path) -> None:
    with ray_workers(cluster.address, partial(ray_parts.dies_and_hangs, tmp_path), 2, tmp_path / "logs") as pool:
        pool.do(parts(3), "work")
        assert [len(nodes_of(tmp_path, number)) for number in (1, 2, 3)] == [1, 2, 1]
        pool.how = replace(pool.how, minutes=0.15)  # now that the processes have started, which takes time
        pool.do(parts(3), "work")
    _, _, hung, again = nodes_of(tmp_path, 2)
    assert again != hung


def test_errors_of_parts(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"part 2 of 3: on .*: there is no column of that name; its output is .*log$"):
        done(cluster, partial(ray_parts.fails, tmp_path), tmp_path)
    assert len(nodes_of(tmp_path, 2)) == 1
    with pytest.raises(UserError, match=r"part 1 of 1: on .*: the disk of .*logs is full; free some space"):
        done(cluster, ray_parts.fills_the_disk, tmp_path, n_parts=1)


def test_a_machine_that_does_not_see_the_files(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "only-here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with ray_workers(cluster.address, partial(ray_parts.noted, tmp_path), 1, tmp_path / "logs") as pool:
        folder.rmdir()
        with pytest.raises(UserError, match=r"part 1 of 1: on .*: .*only-here does not exist there: every machine of"):
            pool.do(parts(1), "work")


def test_resources_that_no_machine_has(cluster: Cluster, tmp_path: Path) -> None:
    for needs, words in ({"cpus": 2}, "2 CPUs and 0 GPUs"), ({"gpus": 0.5}, "1 CPUs and 0.5 GPUs"):
        with pytest.raises(UserError, match=f"a part needs {words} .* the most are 1 CPUs and 0 GPUs"):
            done(cluster, partial(ray_parts.noted, tmp_path), tmp_path, **needs)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "no-such-host.invalid:6379"])
def test_an_address_where_nothing_answers(address: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=f"cluster.address {address}: nothing answers there"), ray_at(address):
        pass
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["cluster.address=here"], "cluster.address is 'here': expected auto, local, host:port or ray://host:port"),
        (["cluster.address=auto", "cluster.parts_per_worker=1"], "times parts_per_worker is one part"),
    ],
)
def test_settings_that_do_not_fit(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(ROOT / "scvi-config.yaml", settings)


def stopped_driver(address: str, folder: Path) -> int:
    """A command that does parts, whose process writes its id."""
    (folder / "driver").write_text(str(os.getpid()))

    def work() -> None:
        with ray_workers(address, partial(ray_parts.sleeps, folder), 2, folder / "logs") as pool:
            pool.do(parts(2), "work")

    raise SystemExit(guarded(work))


def test_parts_end_when_the_command_is_stopped(cluster: Cluster, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as threads:
        command = threads.submit(forked, stopped_driver, cluster.address, tmp_path)
        pids = [int(text_of(tmp_path / f"pid-{number}")) for number in (1, 2)]
        os.kill(int(text_of(tmp_path / "driver")), signal.SIGTERM)
        ended = command.result()
    assert ended.returncode == 143
    assert ended.stderr.splitlines()[-1] == "terminated; run the same command again to resume"
    for pid in pids:
        until(lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]  # mypy infers no type for pid


def command(config: Path, address: str) -> None:
    """The command in a process that writes its id."""
    (config.parent / "driver").write_text(str(os.getpid()))
    workers.do_part = ray_parts.of_small_tiles
    raise SystemExit(main(STAGE, ["--config", str(config), *on_ray(address)]))


def on_ray(address: str) -> list[str]:
    return [f"cluster.address={address}", "cluster.workers=2", "cluster.parts_per_worker=3"]


@pytest.mark.slow
def test_the_result_is_that_of_one_process_whatever_is_killed(
    cluster: Cluster,
    trained: Run,
    undisturbed: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command, while a second one is refused; then a process of Ray; then a node."""
    run = copy_of(trained, tmp_path)
    for number in (1, 2):
        (tmp_path / f"hold-{number}").touch()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(forked, command, run.config, cluster.address)
        for number in (1, 2):
            text_of(tmp_path / f"holding-{number}")
        assert run(STAGE, *on_ray(cluster.address)) == 2
        assert re.search(
            r"^error: .* is in use by scvi-create-latent-update.py \(process", capsys.readouterr().err, re.M
        )
        os.kill(int(text_of(tmp_path / "driver")), signal.SIGKILL)
        assert first.result().returncode == -signal.SIGKILL

    packages = tmp_path / "packages"
    (packages / "torch-1.0.dist-info").mkdir(parents=True)
    (packages / "torch-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    other = partial(ray_parts.of_another_installation, packages, load_config(run.config, on_ray(cluster.address)))
    logs = run.path(f"{LOGS}/{STAGE}")
    with ray_workers(cluster.address, other, 1, logs) as pool:
        with pytest.raises(UserError, match=r"part 1 of 6: on .* were done with other versions: torch 2.*, here 1.0;"):
            pool.do(parts(6), STAGE)

    monkeypatch.setattr(stream, "X_TILE", 100)
    monkeypatch.setattr(workers, "do_part", ray_parts.of_small_tiles)
    for order in ("kill-3", "hold-5"):
        (tmp_path / order).touch()
    with ThreadPoolExecutor() as threads:
        removal = threads.submit(remove_node_of, tmp_path / "holding-5", cluster)
        assert run(STAGE, *on_ray(cluster.address)) == 0
        removal.result()
    said = capsys.readouterr().err
    assert "part 3 of 6 is done again: its process of Ray, or its machine, is gone" in said
    assert re.search(r"part 5 of 6 is done again: its (process of Ray, or its )?machine", said)
    assert digest(run) == undisturbed
    assert run.record(STAGE)["parts"] == 6
    assert "part 4 of 6 of create-latent-update is done" in (logs / "part-00004-of-00006.log").read_text()


def remove_node_of(held: Path, cluster: Cluster) -> None:
    """Remove the node that does a part that waits."""
    raylet = int(text_of(held))
    (node,) = [
        node
        for node in cluster.worker_nodes
        if any(each.process.pid == raylet for each in node.all_processes["raylet"])
    ]
    cluster.remove_node(node, allow_graceful=False)


def text_of(path: Path) -> str:
    """Text of a file, when it is there."""
    until(lambda: path.exists() and path.read_text() != "")
    return path.read_text()


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
