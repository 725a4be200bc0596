"""Several processes of one training: followers wait for the first one; devices are counted on all nodes."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from nodes import on_two_nodes
from pipeline import Run

from census_scvi.errors import UserError
from census_scvi.training.fit import choose_devices, n_processes
from census_scvi.training.settings import TrainSection
from census_scvi.workspace import first_process
from census_scvi.workspace.first_process import FirstProcess


@pytest.mark.parametrize(
    ("settings", "processes", "strategy"),
    [
        ({}, 1, "auto"),
        ({"num_nodes": 3}, 3, "ddp"),
        ({"multi_gpu": True, "devices": 2}, 2, "ddp"),
        ({"multi_gpu": True, "devices": 2, "num_nodes": 3}, 6, "ddp"),
    ],
)
def test_devices_are_those_of_a_node_and_processes_those_of_all(
    settings: dict[str, object], processes: int, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    section = TrainSection.model_validate({"accelerator": "cpu", **settings})
    with caplog.at_level("INFO"):
        chosen = choose_devices(section)
    assert (n_processes(section), chosen["strategy"]) == (processes, strategy)
    assert chosen["devices"] == (2 if section.multi_gpu else 1)
    words = f"{processes} processes on 3 nodes train together: start the command on each node"
    assert (words in caplog.text) == ("num_nodes" in settings)


def test_a_gpu_too_few_is_one_of_this_node() -> None:
    section = TrainSection.model_validate({"accelerator": "auto", "multi_gpu": True, "devices": 40, "num_nodes": 2})
    with pytest.raises(UserError, match=r"asks for devices 40 on each node, but torch finds .* on this one; lower"):
        choose_devices(section)


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FirstProcess:
    monkeypatch.setattr(first_process, "PATIENCE", 1.0)
    monkeypatch.setattr(first_process, "_BEAT", 0.1)
    monkeypatch.setattr(first_process, "_process_start", time.time)  # as in a process that has just started
    return FirstProcess(tmp_path / ".partial" / "first-process.json")


def test_others_wait_as_long_as_the_first_lives(first: FirstProcess) -> None:
    opened = []

    def lead() -> None:
        time.sleep(0.5)
        with first.leading():
            time.sleep(2.0)  # longer than the patience of those who hear nothing
            opened.append(time.monotonic())
            first.open()
            time.sleep(1.0)

    thread = threading.Thread(target=lead)
    thread.start()
    assert first.wait()
    assert opened
    assert time.monotonic() - opened[0] < 0.9
    thread.join()


@pytest.mark.parametrize("left", ["nothing", "open", "ended", "damaged"])
def test_what_an_earlier_training_left_is_no_sign_of_life(first: FirstProcess, left: str, tmp_path: Path) -> None:
    if left != "nothing":
        with first.leading():
            first.open()
            kept = first._path.read_text()
        first._path.write_text({"open": kept, "ended": first._path.read_text(), "damaged": "{"}[left])
    time.sleep(0.1)
    with pytest.raises(UserError, match=r"no first process of this training has given a sign of life in .* rank 0"):
        first.wait()


@pytest.mark.parametrize("error", [UserError("the disk is full"), None, KeyError("genes")])
def test_others_end_as_the_first_did(first: FirstProcess, error: Exception | None) -> None:
    def lead() -> None:
        time.sleep(0.3)
        try:
            with first.leading():
                if error:
                    raise error
        except (UserError, KeyError):
            pass

    thread = threading.Thread(target=lead)
    thread.start()
    if error is None:
        assert not first.wait()
    else:
        with pytest.raises(UserError, match=r"the first process of this training ended: (the disk is full|KeyError)"):
            first.wait()
    thread.join()


# --- two real processes, each on a node of its own, as far as it knows

NODES = {"max_epochs": 2, "batch_size": 64, "num_nodes": 2}
# The first process takes its time before it opens the training; both say when.
SLOW = """
import sys, time
from census_scvi.stages import protocol, train
check, start, follow = train.check_arguments, protocol.Task.start, train.follow
train.check_arguments = lambda *arguments: time.sleep(4) or check(*arguments)
def say(what, work):
    def said(*arguments):
        print(what, time.time(), file=sys.stderr)
        return work(*arguments)
    return said
protocol.Task.start, train.follow = say("opens", start), say("follows", follow)
"""


def test_a_follower_waits_for_a_slow_first_process_and_ends_where_it_refuses_or_is_done(
    finished_run: Run, demo_census: str, tmp_path: Path
) -> None:
    run = Run(tmp_path, demo_census, train=NODES)
    shutil.copytree(finished_run.directory, run.directory)

    for process in on_two_nodes(run):  # the train stage there is of other settings
        assert process.returncode == 2, process.stderr
        assert "a finished train for other settings: train.batch_size was 256 and is 64" in process.stderr

    staging = run.path(".partial/train")
    staging.mkdir(parents=True)
    (staging / "fingerprint.json").write_text('{"config": {"train.batch_size": 8}, "inputs": {}}')
    (staging / "checkpoint.ckpt").write_text("of an earlier training, which the first process deletes")
    first, follower = on_two_nodes(run, "--force", before=SLOW)
    assert (first.returncode, follower.returncode) == (0, 0), first.stderr + follower.stderr
    opened, followed = (
        float(line.split()[1])
        for process, word in ((first, "opens"), (follower, "follows"))
        for line in process.stderr.splitlines()
        if line.startswith(word)
    )
    assert opened < followed
    assert run.record("train")["processes"] == 2
    assert len(run.record("train")["learning_curves"]["elbo_train"]) == 2

    before = run.path("manifest.json").read_bytes()
    for process in on_two_nodes(run):
        assert process.returncode == 0, process.stderr
        assert "train is done for these settings" in process.stderr
    assert run.path("manifest.json").read_bytes() == before


def test_a_follower_with_other_settings_or_nothing_to_train_on_is_told(
    finished_run: Run,
    demo_census: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    run = Run(tmp_path, demo_census, train=NODES)
    assert run("train") == 2
    assert "anndata_model.h5ad does not exist; run scvi-prepare.py first" in capsys.readouterr().err
    assert not run.directory.exists()

    shutil.copytree(finished_run.directory, run.directory)
    first = FirstProcess(run.path(".partial/first-process.json"))
    staging = run.path(".partial/train")
    staging.mkdir(parents=True)
    fingerprint = finished_run.record("train")["fingerprint"]
    (staging / "fingerprint.json").write_text(json.dumps(fingerprint))
    with first.leading():
        first.open()
        assert run("train", "--force") == 2
    said = capsys.readouterr().err
    assert (
        "the first process of this training has other settings than this one: train.batch_size was 256 and is" in said
    )
    assert "start all processes with the same config" in said
