"""The run directory: old or new, never half; skipped, refused or resumed; locked."""

import contextlib
import errno
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import STAGES, Run

from census_scvi.census.open import open_census
from census_scvi.errors import UserError
from census_scvi.files.atomic import write_json
from census_scvi.files.place import recorded
from census_scvi.files.uri import absolute, file_system, local_path, tiledb_place, without_credentials
from census_scvi.query.reference import Origin, RunEmbedding
from census_scvi.report import html
from census_scvi.settings import Config, load_config
from census_scvi.workspace import Workspace
from census_scvi.workspace.identity import BLOCK_BYTES, damage, file_identity
from census_scvi.workspace.provenance import peak_memory_bytes
from census_scvi.workspace.settings import OutputSection

KEYS = ("hvg", "seed")


def config_of(folder: Path, seed: int = 0) -> Config:
    return Config(output=OutputSection(directory=str(folder)), seed=seed)


def run_stage(folder: Path, content: str, seed: int = 0, *, force: bool = False) -> bool:
    """A stage with a file and a folder as outputs; False where it was done before."""
    config = config_of(folder, seed)
    with Workspace(folder).locked("prepare", new=True) as workspace:
        stage = workspace.begin("prepare", config.select(KEYS), {}, force=force)
        if stage.done:
            return False
        stage.start()
        stage.path("file.txt").write_text(content)
        stage.path("model").mkdir(exist_ok=True)
        stage.path("model/weights").write_text(content)
        stage.path("model/more").write_text(content)
        stage.commit(["file.txt", "model"], {"cells": 1}, config=config.model_dump(mode="json"), seed=seed)
    return True


def contents(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in ("file.txt", "model/weights", "model/more")}


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def kill_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die before the given call of whatever changes a name in a folder."""
    left = [calls]

    def dying(real: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*arguments, **options)

        return call

    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    monkeypatch.setattr("shutil.rmtree", dying(__import__("shutil").rmtree))


@settings(max_examples=25, deadline=None)
@given(calls=st.integers(0, 14))
def test_killed_at_any_rename_the_artifacts_are_the_old_or_the_new(
    calls: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    run_stage(folder, "old")
    with pytest.MonkeyPatch.context() as planted:
        kill_after(calls, planted)
        with contextlib.suppress(Killed, UserError):
            run_stage(folder, "new", seed=1)
        with contextlib.suppress(Killed):
            run_stage(folder, "new", seed=1, force=True)
    begun = False
    with Workspace(folder).locked("train") as workspace:  # whoever comes next mends it
        record = workspace.record("prepare")
        assert record is not None
        (content,) = contents(folder)
        assert content == ("old" if record["seed"] == 0 else "new")
        if workspace.manifest().get("redoing"):  # the old is not taken for the new
            assert content == "old"
            with pytest.raises(UserError, match="--force did not finish in"):
                workspace.require("prepare", ["file.txt"])
            begun = True
    if begun:
        assert not run_stage(folder, "old")  # with the settings that it was made with it is what it is
    with Workspace(folder).locked("train") as workspace:
        workspace.require("prepare", ["file.txt", "model/weights", "model/more"])
    assert run_stage(folder, "new", seed=1, force=True)
    assert contents(folder) == {"new"}


def test_done_is_skipped_and_another_setting_is_refused_by_name(tmp_path: Path) -> None:
    assert run_stage(tmp_path, "one")
    assert not run_stage(tmp_path, "two")
    with pytest.raises(UserError, match="holds a finished prepare for other settings: seed was 0 and is 3"):
        run_stage(tmp_path, "two", seed=3)
    assert contents(tmp_path) == {"one"}
    assert run_stage(tmp_path, "two", seed=3, force=True)
    assert contents(tmp_path) == {"two"}


def test_an_unfinished_stage_goes_on_only_for_the_same_settings(tmp_path: Path) -> None:
    def begin(seed: int, *, force: bool = False) -> bool:
        with Workspace(tmp_path).locked("train") as workspace:
            stage = workspace.begin("train", config_of(tmp_path, seed).select(KEYS), {}, force=force, progress="work")
            stage.start()
            there = stage.path("work").exists()
            stage.path("work").touch()
            return there

    assert not begin(0)
    assert begin(0)
    with pytest.raises(UserError, match="an unfinished train for other settings: seed was 0 and is 1"):
        begin(1)
    assert begin(0)
    assert not begin(1, force=True)


def test_a_stage_that_starts_over_does_not_mind_unfinished_work(tmp_path: Path) -> None:
    for seed in (0, 1):  # the first stops without a commit, as after a mistake in the settings
        with Workspace(tmp_path).locked("prepare") as workspace:
            stage = workspace.begin("prepare", config_of(tmp_path, seed).select(KEYS), {}, force=False)
            stage.start()
            assert not stage.path("work").exists()
            stage.path("work").touch()


def test_what_a_killed_force_run_of_other_settings_left_goes_with_the_settings(tmp_path: Path) -> None:
    assert run_stage(tmp_path, "old")
    with Workspace(tmp_path).locked("prepare") as workspace:
        killed = workspace.begin("prepare", config_of(tmp_path, 1).select(KEYS), {}, force=True)
        killed.start()
        killed.path("large.tmp").touch()
    assert not run_stage(tmp_path, "new"), "set back to the settings of the finished run, it is done"
    assert not killed.staging.exists()
    assert contents(tmp_path) == {"old"}


def test_an_input_that_changed_under_a_finished_stage_is_named(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for identity, outcome in (("a", "starts"), ("a", "done"), ("b", "refused")):
        with Workspace(tmp_path).locked("train") as workspace:
            if outcome == "refused":
                with pytest.raises(UserError, match=r"the input cells\.h5ad has changed"):
                    workspace.begin("train", config.select(KEYS), {"cells.h5ad": identity}, force=False)
                continue
            stage = workspace.begin("train", config.select(KEYS), {"cells.h5ad": identity}, force=False)
            assert stage.done == (outcome == "done")
            if not stage.done:
                stage.start()
                stage.commit([], {}, config={}, seed=0)


def test_an_altered_output_is_refused_by_the_stage_itself(tmp_path: Path) -> None:
    run_stage(tmp_path, "one")
    (tmp_path / "file.txt").write_text("two")
    with pytest.raises(UserError, match=r"file\.txt has changed since it was written by scvi-prepare\.py"):
        run_stage(tmp_path, "one")


def test_the_second_run_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    with Workspace(tmp_path).locked("train"):
        code = (
            "import sys, pathlib; from census_scvi.workspace import Workspace\n"
            f"with Workspace(pathlib.Path({str(tmp_path)!r})).locked('prepare'): pass"
        )
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert second.returncode != 0
    assert "is in use by scvi-train.py (process " in second.stderr


def test_the_lock_ends_with_the_process(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal; from census_scvi.workspace import Workspace\n"
        f"with Workspace(pathlib.Path({str(tmp_path)!r})).locked('prepare'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    with Workspace(tmp_path).locked("prepare"):
        pass


def test_the_manifest_says_what_ran(tmp_path: Path) -> None:
    run_stage(tmp_path, "one")
    record = json.loads((tmp_path / "manifest.json").read_text())["stages"]["prepare"]
    assert record["config"]["hvg"]["top_n_hvg"] == 8000
    assert record["fingerprint"]["config"] == {
        "hvg.engine": "one-pass", "hvg.hvg_batch": [], "hvg.min_genes": 0, "hvg.top_n_hvg": 8000, "seed": 0
    }  # fmt: skip
    assert record["outputs"]["file.txt"] == {
        "size": 3, "sha256": ["7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"]
    }  # fmt: skip
    for key in ("seconds", "cpu_seconds", "peak_memory_bytes", "packages", "hardware", "started", "finished", "seed"):
        assert key in record
    assert record["packages"]["scvi-tools"]


def test_peak_memory_is_this_process_s_own_and_not_its_parent_s() -> None:
    ballast = np.ones(60_000_000)  # 0.5 GB, in this process
    code = "from census_scvi.workspace.provenance import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < ballast.nbytes < peak_memory_bytes()


def test_a_damaged_manifest_is_said(tmp_path: Path) -> None:
    run_stage(tmp_path, "one")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        run_stage(tmp_path, "one")


def places(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of nested mappings."""
    for key, value in values.items() if isinstance(values, dict) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def test_no_gap_in_a_manifest_is_a_traceback(
    finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each key is taken out, and replaced by what does not belong there: whoever reads it copes or says so."""
    monkeypatch.setattr("census_scvi.report.figures.draw_curves", lambda curves, names: (dict(curves), names))
    run = Run.given(tmp_path, yaml.safe_load(finished_run.config.read_text()), finished_run.directory)
    config, path = load_config(run.config), run.directory / "manifest.json"
    workspace, whole, refused = Workspace(run.directory), run.manifest(), 0
    kept = ("config", "packages", "code", "learning_curves")  # their keys are not read one by one
    keys = [key for key in places(whole["stages"]) if not set(kept) & set(key[1:-1])]
    with open_census(config.census) as census:
        for key, junk in itertools.product(keys, (None, 5, [1], {"x": "y"})):
            damaged = json.loads(json.dumps(whole))
            owner = functools.reduce(dict.__getitem__, key[:-1], damaged["stages"])
            if junk is None:
                del owner[key[-1]]
            else:
                owner[key[-1]] = junk
            path.write_text(json.dumps(damaged))
            for read in (
                lambda: workspace.require("train", ["scvi.model/model.json"]),
                lambda: workspace.begin("prepare", config.select(KEYS), {}, force=False),
                lambda: Origin.of(str(run.directory)),
                lambda: RunEmbedding(run.directory, census),
                lambda: html._training(config.directory),
                lambda: [workspace.whole_record(stage) for stage in STAGES],
            ):
                try:
                    read()
                except UserError as error:
                    refused += 1
                    assert "\n" not in str(error)
    assert refused > len(keys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested deeper than 50 levels"),
        ('{"stages": ' + '{"a": ' * 5000, "nested deeper than 50 levels"),
        ("[]", "is damaged"),
        ("null", "is damaged"),
        ('{"stages": []}', "is damaged"),
        ('{"stages": {"train": null}}', "is damaged"),
        ('{"stages": {}, "committing": 5}', "is damaged"),
        ('{"stages": {}, "redoing": 5}', "is damaged"),
        ('{"stages": {}, "redoing": []}', "is damaged"),
        ("\udcff", "is damaged"),
    ],
    ids=range(10),
)
def test_a_manifest_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=words):
        run_stage(tmp_path, "one")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"config": 5, "inputs": {}}', '{"config": {}}', "{"])
def test_a_damaged_fingerprint_of_unfinished_work_is_said(text: str, tmp_path: Path) -> None:
    with Workspace(tmp_path).locked("train") as workspace:
        stage = workspace.begin("train", config_of(tmp_path).select(KEYS), {}, force=False, progress="work")
        stage.start()
        stage.path("work").touch()
        stage.path("fingerprint.json").write_text(text)
        with pytest.raises(UserError, match=r"fingerprint\.json is damaged .*; --force does train again"):
            workspace.begin("train", config_of(tmp_path).select(KEYS), {}, force=False, progress="work")
        assert not workspace.begin("train", config_of(tmp_path).select(KEYS), {}, force=True, progress="work").resumed


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuses)
    with pytest.raises(
        UserError, match=r"the file system of .* does not support file locks .*; use a folder on another"
    ):
        run_stage(tmp_path, "one")


def test_a_lock_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock is a folder, .*; remove it"):
        run_stage(tmp_path, "one")


@pytest.mark.parametrize("stage", ["train", "create-latent-update", "publish"])
def test_a_run_that_does_not_exist_leaves_no_folder(
    stage: str, demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, demo_census)
    assert run(stage) == 2
    assert "does not exist; run scvi-prepare.py first" in capsys.readouterr().err
    assert not run.directory.exists()


def test_output_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output\.directory .*/file cannot be created: File exists"):
        run_stage(tmp_path / "file", "one")


@given(data=st.binary(max_size=2000), flip=st.integers(0, 1999))
def test_any_changed_byte_changes_the_identity(
    data: bytes, flip: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("identity") / "file"
    path.write_bytes(data)
    identity = file_identity(path)
    assert damage(path, identity) is None
    if flip < len(data):
        path.write_bytes(data[:flip] + bytes([data[flip] ^ 1]) + data[flip + 1 :])
        assert damage(path, identity) == "has changed since it was written"
    path.write_bytes(data + b"x")
    assert "bytes, expected" in str(damage(path, identity))


def test_large_files_are_hashed_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(BLOCK_BYTES + 5)
    one = file_identity(path)
    assert len(one["sha256"]) == 2
    with path.open("r+b") as file:
        file.seek(BLOCK_BYTES + 1)
        file.write(b"x")
    other = file_identity(path)
    assert one["sha256"][0] == other["sha256"][0]  # the list says which block differs
    assert one["sha256"][1] != other["sha256"][1]


def test_names_of_artifacts_follow_the_config(tmp_path: Path) -> None:
    names = config_of(tmp_path).artifacts
    assert (names.prepared, names.model, names.genes) == ("anndata_model.h5ad", "scvi.model", "hv_genes.pkl")


@pytest.mark.parametrize(
    ("uri", "written"),
    [
        ("s3://bucket/census", "s3://bucket/census"),
        ("/data/census?x", "/data/census?x"),
        ("https://me:secret@host/a/b", "https://***@host/a/b"),
        ("https://host/census?X-Amz-Signature=abc&Expires=1", "https://host/census?***"),
        ("see ftp://token@host/x and s3://b/c", "see ftp://***@host/x and s3://b/c"),
    ],
)
def test_what_opens_a_door_is_not_written_down(uri: str, written: str) -> None:
    assert without_credentials({"a": [uri, 1], "b": {"c": uri}, "d": None}) == {
        "a": [written, 1], "b": {"c": written}, "d": None,
    }  # fmt: skip


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1))
def test_any_name_of_a_path_leads_to_that_path(name: str) -> None:
    path = Path("/folder") / f"x{name}" / f"{name}y"
    for place in (str(path), f"file://{path}", f"FILE://localhost{path}"):
        assert local_path(place) == path
        assert local_path(absolute(place)) == path
        assert file_system(place)[1] == str(path)
    assert local_path(path.as_uri()) == Path(path.as_uri().removeprefix("file://"))  # neither exists: as written
    assert local_path(name) == Path(name)
    assert absolute(f"x{name}") == str(Path.cwd() / f"x{name}")


def test_an_encoded_file_url_leads_to_what_exists(tmp_path: Path) -> None:
    encoded, plain = tmp_path / "a%20b", tmp_path / "a b"
    plain.mkdir()
    assert local_path(plain.as_uri()) == plain
    assert tiledb_place(plain.as_uri(), "census.uri") == f"file://{plain}"
    encoded.mkdir()
    assert local_path(f"file://{encoded}") == encoded
    assert local_path(encoded.as_uri()) == encoded


@pytest.mark.parametrize(
    "url", ["s3://b/c d", "S3://b", "memory://x", "hf://datasets/a", "simplecache::s3://b/c", "zip://a::file:///b.zip"]
)
def test_other_urls_stay_as_they_are(url: str) -> None:
    assert local_path(url) is None
    assert absolute(url) == tiledb_place(url, "census.uri") == url


@pytest.mark.parametrize(
    "setting", ["output.directory=s3://b/run", "evaluate.folder=file:///b", "query.output=gs://b/x.h5ad"]
)
def test_a_url_where_a_local_path_belongs_is_refused(setting: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match="expected a path on this machine, not a URL"):
        load_config(tmp_path / "config.yaml", [setting])


def test_a_run_directory_that_lightning_would_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="interprets '::' in a path"), Workspace(tmp_path / "a::b").locked("prepare"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["outputs", "artifacts", "stage", "committing"])
@pytest.mark.parametrize("name", ["../../victim", "/etc/passwd"])
def test_a_manifest_that_points_outside_is_refused(place: str, name: str, tmp_path: Path) -> None:
    record: dict[str, Any] = {"artifacts": [], "outputs": {}}
    if place == "outputs":
        record["outputs"] = {name: {"size": 1, "sha256": []}}
    elif place == "artifacts" or place == "committing":
        record["artifacts"] = [name]
    stages = {name if place == "stage" else "train": record}
    manifest = {"stages": {}, "committing": stages} if place == "committing" else {"stages": stages}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="which is outside the run directory; do not trust it"):
        Workspace(tmp_path).manifest()


@pytest.mark.parametrize("name", [".lock", "manifest.json.partial"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_what_lies_where_a_file_of_ours_belongs_is_neither_followed_nor_emptied(
    name: str, kind: str, tmp_path: Path
) -> None:
    directory, theirs = tmp_path / "run", tmp_path / "thesis.tex"
    directory.mkdir()
    if kind == "link":
        theirs.write_text("years of work")
    if "link" in kind:
        (directory / name).symlink_to(theirs)
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(directory / name)
    if name == ".lock":
        words = {"link": "a link", "dangling link": "a link", "folder": "a folder", "pipe": "no plain file"}[kind]
        with (
            pytest.raises(UserError, match=rf"\.lock is {words}, expected a lock file; remove it"),
            Workspace(directory).locked("train"),
        ):
            pass
    else:
        write_json(directory / "manifest.json", {"stages": {}})
        assert Workspace(directory).manifest() == {"stages": {}}
        assert not (directory / name).exists()
    assert theirs.exists() == (kind == "link")
    assert kind != "link" or theirs.read_text() == "years of work"


def test_a_place_in_a_record_names_no_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    folder = Path("/home/me/run/published")
    places = {"/home/me/census": "../../census", "/home/you/census": None, "/data/census": None, "s3://b/c": "s3://b/c"}
    assert {place: recorded(place, folder) for place in places} == places
