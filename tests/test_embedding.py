"""Embeddings in a Census: whole or not there, read by the Census API, replaced in one step, never doubled."""

import json
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cellxgene_census
import fsspec
import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma
from cellxgene_census import _release_directory
from cellxgene_census.experimental import get_embedding, get_embedding_metadata
from faulty_disk import CELLS, KILLED, run_driver, small_experiment
from pipeline import forked, run_code

from census_scvi.census.embedding import EmbeddingHash, published_uri, read_embedding
from census_scvi.errors import UserError
from census_scvi.publication import group, obsm, summary
from census_scvi.publication.obsm import EmbeddingDraft
from census_scvi.publication.summary import append_summary, provenance_of, read_summary

ORGANISM = "homo_sapiens"
N_LATENT = 4
INFO = {"id": "1", "census_version": "local", "experiment_name": ORGANISM, "measurement_name": "RNA"}
PUBLICATIONS = ["a" * 32, "b" * 32]


@pytest.fixture
def experiment(demo_census: str, tmp_path: Path) -> str:
    """An Experiment of a Census that may be written to."""
    shutil.copytree(demo_census, tmp_path / "census")
    return f"{tmp_path}/census/census_data/{ORGANISM}"


def n_cells(experiment: str) -> int:
    with tiledbsoma.open(experiment) as opened:
        return int(opened.obs.count)


def values_of(experiment: str, seed: int, n_latent: int = N_LATENT) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(n_cells(experiment), n_latent)).astype(np.float32)
    values[::7, -1] = 0.0  # explicit zeros are values
    return values


def fill(draft: EmbeddingDraft, values: np.ndarray, block: int = 400, skip: int = 0) -> None:
    for start in range(skip, len(values), block):
        stop = min(start + block, len(values))
        draft.write(np.arange(start, stop), values[start:stop])


def draft_of(experiment: str, publication: str = PUBLICATIONS[0], **options: Any) -> EmbeddingDraft:
    shape = (n_cells(experiment), options.pop("n_latent", N_LATENT))
    return EmbeddingDraft(experiment, "scvi", shape, publication, **{"replace": False, **options})


def publish(experiment: str, values: np.ndarray, publication: str = PUBLICATIONS[0], *, replace: bool = False) -> None:
    draft = draft_of(experiment, publication, replace=replace, n_latent=values.shape[1])
    if not draft.done:
        fill(draft, values)
    draft.publish({**INFO, "id": publication})


def published(experiment: str) -> np.ndarray | None:
    uri = published_uri(experiment, "scvi")
    if uri is None:
        return None
    joinids, values = zip(*read_embedding(uri), strict=True)
    assert np.concatenate(joinids).tolist() == list(range(n_cells(experiment)))
    return np.concatenate(values)


def test_the_census_api_reads_it(experiment: str) -> None:
    values = values_of(experiment, 0)
    publish(experiment, values)
    uri = published_uri(experiment, "scvi")
    with cellxgene_census.open_soma(uri=str(Path(experiment).parents[1])) as census:
        cells = cellxgene_census.get_anndata(
            census, ORGANISM, obs_value_filter="nnz > 200", var_coords=[0, 1], obsm_layers=["scvi"]
        )
    joinids = cells.obs["soma_joinid"].to_numpy()
    assert 0 < len(joinids) < len(values)
    assert np.array_equal(cells.obsm["scvi"], values[joinids])
    assert get_embedding_metadata(uri) == {**INFO, "id": PUBLICATIONS[0]}


def test_get_embedding_reads_it(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function asks a server for the releases: here is one, with this Census as a release."""
    values = values_of(experiment, 0)
    publish(experiment, values)
    census = Path(experiment).parents[1]
    release = {"release_date": None, "release_build": "local", "soma": {"uri": str(census)}, "h5ads": {"uri": ""}}

    class Releases(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            mirrors = {"default": "here", "here": {"provider": "file", "base_uri": "file:///", "region": None}}
            self.wfile.write(json.dumps(mirrors if "mirrors" in self.path else {"local": release}).encode())

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Releases) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(_release_directory, "CELL_CENSUS_RELEASE_DIRECTORY_URL", address + "releases")
        monkeypatch.setattr(_release_directory, "CELL_CENSUS_MIRRORS_DIRECTORY_URL", address + "mirrors")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        found = get_embedding("local", str(published_uri(experiment, "scvi")), np.array([5, 3, 700]))
        server.shutdown()
    assert np.array_equal(found, values[[5, 3, 700]])


def test_cells_without_embedding_have_none(experiment: str) -> None:
    values = values_of(experiment, 0)
    draft = draft_of(experiment)
    draft.write(np.array([3, 10]), values[[3, 10]])
    draft.publish(INFO)
    ((joinids, found),) = read_embedding(str(published_uri(experiment, "scvi")))
    assert joinids.tolist() == [3, 10]
    assert np.array_equal(found, values[[3, 10]])


def test_nothing_is_there_before_it_is_whole_and_nothing_is_doubled(experiment: str) -> None:
    values = values_of(experiment, 0)
    draft = draft_of(experiment)
    fill(draft, values[:800])
    assert published(experiment) is None
    again = draft_of(experiment)  # another process goes on, with blocks that overlap
    fill(again, values, block=300, skip=500)
    again.publish(INFO)
    assert np.array_equal(published(experiment), values)
    assert draft_of(experiment).done


def test_a_taken_name_is_refused(experiment: str) -> None:
    values = values_of(experiment, 0)
    publish(experiment, values)
    with pytest.raises(UserError, match=r"has an obsm\['scvi'\] already; set publish.replace"):
        draft_of(experiment, PUBLICATIONS[1])
    assert np.array_equal(published(experiment), values)


@pytest.mark.parametrize("n_latent", [N_LATENT, N_LATENT + 3, 1])
def test_a_reader_sees_the_old_or_the_new(n_latent: int, experiment: str) -> None:
    old, new = values_of(experiment, 0), values_of(experiment, 1, n_latent)
    publish(experiment, old)
    array_before = tiledbsoma.open(published_uri(experiment, "scvi"))
    experiment_before = tiledbsoma.open(experiment)
    seen: list[str] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            found = published(experiment)
            seen.append("old" if np.array_equal(found, old) else "new" if np.array_equal(found, new) else "neither")

    reader = threading.Thread(target=look)
    reader.start()
    publish(experiment, new, PUBLICATIONS[1], replace=True)
    while not seen or seen[-1] == "old":
        assert reader.is_alive()
    stop.set()
    reader.join()
    assert set(seen) <= {"old", "new"}
    assert seen == sorted(seen, reverse=True)  # never back
    assert np.array_equal(published(experiment), new)
    for array in (array_before, experiment_before.ms["RNA"].obsm["scvi"]):
        table = array.read().tables().concat().to_pandas().sort_values(["soma_dim_0", "soma_dim_1"])
        assert np.array_equal(table["soma_data"].to_numpy(), old.ravel())


def test_what_was_replaced_may_be_deleted_and_replaced_again(experiment: str) -> None:
    publish(experiment, values_of(experiment, 0))
    publish(experiment, values_of(experiment, 1, 2), PUBLICATIONS[1], replace=True)
    shutil.rmtree(f"{experiment}/ms/RNA/obsm/scvi-{PUBLICATIONS[0][:12]}")
    values = values_of(experiment, 2, 3)
    publish(experiment, values, "c" * 32, replace=True)
    assert np.array_equal(published(experiment), values)
    with tiledbsoma.open(f"{experiment}/ms/RNA/obsm", "d") as obsm:  # an ordinary collection still
        del obsm["scvi"]
    assert published(experiment) is None
    publish(experiment, values, "d" * 32)
    assert np.array_equal(published(experiment), values)


def test_a_replacement_may_have_fewer_cells(experiment: str) -> None:
    publish(experiment, values_of(experiment, 0))
    draft = draft_of(experiment, PUBLICATIONS[1], replace=True)
    draft.write(np.array([3, 10]), values_of(experiment, 1)[[3, 10]])
    draft.publish(INFO)
    ((joinids, _),) = read_embedding(str(published_uri(experiment, "scvi")))
    assert joinids.tolist() == [3, 10]


def test_a_collection_written_by_a_clock_ahead_is_refused_or_waited_for(
    experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = values_of(experiment, 0), values_of(experiment, 1)
    publish(experiment, old)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 3600 * 10**9)
    with pytest.raises(UserError, match=r"was last written 3[56]\d\d seconds from now: the clock"):
        publish(experiment, new, PUBLICATIONS[1], replace=True)
    assert np.array_equal(published(experiment), old)
    monkeypatch.setattr(time, "time_ns", lambda: real() - 5 * 10**9)
    publish(experiment, new, PUBLICATIONS[1], replace=True)
    assert np.array_equal(published(experiment), new)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


# Steps of a first publication and of a replacement: what is called, and which of its calls.
ANY = [(tiledbsoma.SparseNDArray, "create", 1), (tiledbsoma.SparseNDArray, "write", 2), (json, "dumps", 1)]
FIRST = [*ANY, (obsm, "name_member", 2)]
REPLACEMENT = [*ANY, (group, "_record", 1), (group, "sync", 1), (Path, "rename", 1), (group, "sync", 2)]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("replace", "owner", "name", "nth"),
    [*((False, *step) for step in FIRST), *((True, *step) for step in REPLACEMENT)],
)
def test_killed_anywhere_it_is_as_before_or_complete_and_a_rerun_finishes(
    owner: Any, name: str, nth: int, after: bool, replace: bool, experiment: str
) -> None:
    old, new = (values_of(experiment, 0) if replace else None), values_of(experiment, 1)
    if old is not None:
        publish(experiment, old)
    real, calls = getattr(owner, name), [0]

    def dying(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        dies = calls[0] == nth
        if dies and not after:
            raise Killed
        result = real(*arguments, **options)
        if dies:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            publish(experiment, new, PUBLICATIONS[1], replace=replace)
    found = published(experiment)
    assert any(found is side or np.array_equal(found, side) for side in (old, new))
    publish(experiment, new, PUBLICATIONS[1], replace=replace)
    assert np.array_equal(published(experiment), new)
    assert get_embedding_metadata(published_uri(experiment, "scvi"))["id"] == PUBLICATIONS[1]


def test_an_array_that_was_half_made_is_made_anew(experiment: str) -> None:
    draft = draft_of(experiment)
    shutil.rmtree(Path(draft.uri.removeprefix("file://")) / "__meta")  # its maker was killed before it wrote that
    values = values_of(experiment, 0)
    publish(experiment, values)
    assert np.array_equal(published(experiment), values)


def test_a_name_that_was_taken_meanwhile_is_replaced(experiment: str) -> None:
    first, second = values_of(experiment, 0), values_of(experiment, 1)
    fill(draft_of(experiment, PUBLICATIONS[1]), second[:800])  # killed here
    publish(experiment, first)  # another publisher
    draft = draft_of(experiment, PUBLICATIONS[1], replace=True)
    assert not draft.empty
    fill(draft, second, skip=800)
    draft.publish(INFO)
    assert np.array_equal(published(experiment), second)


def test_a_name_that_another_publisher_takes_at_the_same_time_is_refused(
    experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage without locks: another publisher is done between a publisher's look at the name and its taking."""
    first, second = values_of(experiment, 0), values_of(experiment, 1)
    draft, other = draft_of(experiment), draft_of(experiment, PUBLICATIONS[1])
    fill(draft, first)
    fill(other, second)
    other.publish({**INFO, "id": PUBLICATIONS[1]})
    with pytest.raises(UserError, match=r"was replaced by another \(.*scvi-b+\) while this publication was written"):
        draft.publish(INFO)
    assert np.array_equal(published(experiment), second)
    real, late = obsm.name_member, draft_of(experiment, "c" * 32, replace=True)
    later = draft_of(experiment, "d" * 32, replace=True)

    def after_mine(*arguments: Any) -> str:
        record = real(*arguments)
        monkeypatch.setattr(obsm, "name_member", real)
        fill(later, first)
        later.replaces = published_uri(experiment, "scvi")
        later.publish({**INFO, "id": "d" * 32})
        return record

    fill(late, second)
    monkeypatch.setattr(obsm, "name_member", after_mine)
    with pytest.raises(UserError, match="by another"):
        late.publish(INFO)
    assert np.array_equal(published(experiment), first)
    with tiledbsoma.open(str(published_uri(experiment, "scvi"))) as array:
        assert array.metadata[obsm.PUBLICATION] == "d" * 32


def row_of(publication: str, published_on: str) -> dict[str, Any]:
    row: dict[str, Any] = {field.name: 0 if pa.types.is_integer(field.type) else "-" for field in summary._SCHEMA}
    row |= {"publication": publication, "published_on": published_on}
    return {name: value for name, value in row.items() if name not in ("soma_joinid", "provenance")}


@pytest.mark.parametrize("first_of_all", [True, False])
def test_the_rows_of_two_publishers_at_once_are_both_there(
    first_of_all: bool, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage without locks: another one appends between a publisher's look at the table and its writing."""
    if not first_of_all:
        append_summary(experiment, row_of("old", "2025-01-01"), {})
    real = summary.read_summary

    def meanwhile(uri: str) -> Any:
        found = real(uri)
        monkeypatch.setattr(summary, "read_summary", real)
        append_summary(experiment, row_of("theirs", "2026-02-02"), {"whose": "theirs"})
        return found

    monkeypatch.setattr(summary, "read_summary", meanwhile)
    append_summary(experiment, row_of("mine", "2026-01-01"), {"whose": "mine"})
    assert read_summary(experiment)["publication"].tolist() == ["old", "mine", "theirs"][first_of_all:]
    for publication in ("mine", "theirs"):
        assert provenance_of(experiment, publication) == {"whose": publication}
    append_summary(experiment, row_of("mine", "2026-03-03"), {"whose": "nobody"})  # there already: it stays as it is
    assert provenance_of(experiment, "mine") == {"whose": "mine"}


PUBLISHER = """
import pathlib, sys, time
import census_scvi.publication.summary, faulty_disk
experiment, publication, seed, name, start = sys.argv[1:]
pathlib.Path(f"{start} {seed}").touch()
while not pathlib.Path(start).exists():
    time.sleep(0.01)
faulty_disk.publish(experiment, publication, int(seed), replace=False, name=name)
"""
LOOK = (
    "import faulty_disk, json, sys; print(json.dumps([faulty_disk.look(sys.argv[1], name) for name in sys.argv[2:]]))"
)


def in_tests(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Code in a process of its own that finds the modules of the tests."""
    return forked(run_code, code, *arguments, cwd=Path(__file__).parent)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("one", "two"), ("scvi", "scvi")], ids=["two names", "one name"])
def test_two_publishers_to_one_bucket_at_once(names: tuple[str, str], bucket: str, tmp_path: Path) -> None:
    """In processes of their own, as TileDB looks for the server's address once."""
    experiment = f"{bucket}/experiment"
    small_experiment(str(tmp_path / "experiment"))
    fsspec.filesystem("s3").put(str(tmp_path / "experiment"), experiment, recursive=True)
    start = tmp_path / "start"
    with ThreadPoolExecutor(2) as pool:
        publishers = [
            pool.submit(in_tests, PUBLISHER, experiment, digit * 32, str(seed), name, str(start))
            for seed, (name, digit) in enumerate(zip(names, "ab", strict=True))
        ]
        while not all(Path(f"{start} {seed}").exists() for seed in (0, 1)):  # both have imported what they need
            if any(publisher.done() for publisher in publishers):  # with an error
                break
            time.sleep(0.01)
        start.touch()
    ends = [(publisher.result().stderr, publisher.result().returncode) for publisher in publishers]
    looked = in_tests(LOOK, experiment, *names)
    assert looked.returncode == 0, looked.stderr
    found = json.loads(looked.stdout)
    if names[0] != names[1]:
        assert [code for _, code in ends] == [0, 0], ends
        assert [look["embedding"] for look in found] == [0, 1]
    else:
        (winner,) = [seed for seed, (_, code) in enumerate(ends) if not code]
        assert found[0]["embedding"] == winner
        assert "UserError: " in ends[1 - winner][0].splitlines()[-1]
    assert {"ab"[seed] * 32 for seed, (_, code) in enumerate(ends) if not code} <= set(found[0]["publications"])


# --- a disk that fails


READABLE = ({"cells": CELLS, "embedding": None}, {"cells": CELLS, "embedding": 0}, {"cells": CELLS, "embedding": 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "full", "first", "stride"),
    [("first", 0, 1, 2), ("first", 1, 2, 6), ("replacement", 0, 2, 4)],
    ids=["killed", "disk full", "killed while it replaces"],
)
def test_no_operation_at_which_a_publisher_ends_harms_a_reader_or_a_rerun(
    kind: str, full: int, first: int, stride: int, tmp_path: Path
) -> None:
    events = run_driver(tmp_path, kind, str(full), str(first), str(stride))
    assert len(events) > 10
    for event in events:
        assert "found" not in event["fault"] or event["fault"]["found"] == event["of"], event
        assert full or event["fault"]["exit"] == KILLED, event
        before, after = event["before"].get("found"), event["after"].get("found")
        assert before, event
        assert {name: before[name] for name in ("cells", "embedding")} in READABLE, event
        assert before["embedding"] != 0 or kind == "replacement", event
        assert before["embedding"] is not None or kind == "first", event
        expected = ["a" * 32, "b" * 32][kind == "first" :]
        assert after == {"cells": CELLS, "embedding": 1, "publications": expected}, event
        assert not event["left"], event


@pytest.mark.parametrize("cut", [None, "__meta", "__schema", "__tiledb_group.tdb"])
@pytest.mark.parametrize("member", ["obsm", "scvi_summary"])
def test_a_member_that_was_made_and_never_named_is_no_obstacle(member: str, cut: str | None, experiment: str) -> None:
    orphan = Path(experiment) / "ms" / "RNA" / member
    make = tiledbsoma.Collection.create if member == "obsm" else summary._create
    make(str(orphan)).close()
    if cut and (orphan / cut).exists():
        group.remove(orphan / cut)
    publish(experiment, values_of(experiment, 0))
    append_summary(experiment, row_of("x", "2025-01-01"), {})
    assert np.array_equal(published(experiment), values_of(experiment, 0))
    assert len(read_summary(experiment)) == 1


def test_a_folder_with_data_that_is_in_the_way_is_not_deleted(experiment: str) -> None:
    stray = Path(experiment) / "ms" / "RNA" / "obsm" / "mine" / "__schema"
    stray.mkdir(parents=True)
    with pytest.raises(UserError, match=r"ms/RNA/obsm is in the way: it cannot be opened and belongs to no group"):
        draft_of(experiment)
    assert stray.exists()


def test_a_record_that_was_cut_off_is_named(experiment: str) -> None:
    publish(experiment, values_of(experiment, 0))
    record = max((Path(experiment) / "ms" / "RNA" / "__group").iterdir())
    record.write_bytes(record.read_bytes()[:52])
    with pytest.raises(UserError, match=rf"its record \S+{record.name} is truncated.*; delete that file"):
        published_uri(experiment, "scvi")
    record.unlink()
    assert published_uri(experiment, "scvi") is None


def test_a_hash_does_not_depend_on_blocks_and_changes_with_one_bit() -> None:
    joinids, values = np.arange(50) * 2, np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)

    def digest(*cuts: int) -> str:
        found = EmbeddingHash()
        for rows in np.split(np.arange(50), cuts):
            found.update(joinids[rows], values[rows])
        return found.hexdigest()

    whole = digest()
    assert digest(1, 7, 40) == whole
    values.view(np.uint32)[31, 2] ^= 1
    assert digest() != whole
    values.view(np.uint32)[31, 2] ^= 1
    joinids[3] += 1
    assert digest() != whole


def test_a_cell_with_a_missing_value_is_named(experiment: str) -> None:
    publish(experiment, values_of(experiment, 0))
    uri = str(published_uri(experiment, "scvi"))
    with tiledbsoma.open(uri, "d") as array:
        array.delete_cells([(slice(17, 17)), (slice(1, 1))])
    with pytest.raises(UserError, match="soma_joinid 17 does not have one value in each of 4 dimensions"):
        list(read_embedding(uri))


def test_a_place_that_is_no_experiment_is_said(tmp_path: Path, demo_census: str) -> None:
    for place in (str(tmp_path / "nothing"), demo_census):
        with pytest.raises(UserError, match="is not a SOMA Experiment"):
            published_uri(place, "scvi")
