"""A published folder that somebody else made: forged, damaged or made to harm, it is refused in words."""

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import tiledbsoma
import torch
from pipeline import Run
from safetensors.torch import load_file, save_file

import census_scvi
from census_scvi.atlas import Atlas
from census_scvi.census.embedding import published_uri
from census_scvi.cli import main
from census_scvi.counts.row_hash import row_hashes
from census_scvi.errors import UserError
from census_scvi.model.encode import reference_latent
from census_scvi.model.published import read_provenance, seal_of
from census_scvi.model.safe import load_safe
from census_scvi.publication import chain
from census_scvi.publication.chain import Link, verify
from census_scvi.query.reference import Origin
from census_scvi.workspace.identity import identities

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def publication(finished_run: Run, demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Census and a run that is published in it; tests only read it."""
    folder = tmp_path_factory.mktemp("publication")
    shutil.copytree(demo_census, folder / "census")
    run = Run(folder, str(folder / "census"), gates={"sample_size": 40})
    shutil.copytree(finished_run.directory, run.directory)
    assert run("publish") == 0
    return folder


@pytest.fixture
def folder(publication: Path, tmp_path: Path) -> Path:
    """A copy of the published folder, to be harmed."""
    shutil.copytree(publication / "run" / "published", tmp_path / "published")
    return tmp_path / "published"


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "provenance.json").read_text())


def forge(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda record: None) -> None:
    """Change the record, and let files and seal fit: what somebody does who knows how the seal is made."""
    record = record_of(folder)
    record["files"] = identities(folder, record["files"])
    record.pop("seal")
    record = change(record) or record
    (folder / "provenance.json").write_text(json.dumps({**record, "seal": seal_of(record)}))


def broken(links: list[Link]) -> dict[str, str]:
    return {link.name: link.finding for link in links if not link.valid}


def edit_model(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(change(values) or values))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "weights.safetensors")
    change(weights)
    save_file(weights, folder / "weights.safetensors")


# --- forged


def negate(weights: dict[str, torch.Tensor]) -> None:
    for name in weights:
        if "mean_encoder" in name:
            weights[name] = -weights[name]


def test_a_limit_in_the_record_is_not_believed(folder: Path) -> None:
    edit_weights(folder, negate)
    forge(folder, lambda record: record["config"]["gates"].update(max_difference=1e9))
    found = broken(verify(str(folder)))
    assert set(found) == {"sealed_embedding"}
    assert "40 of 40 cells read again differ" in found["sealed_embedding"]


def set_gate(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        for gate in record["gates"]["gates"]:
            if gate["name"] == name:
                gate.update(values)

    return change


@pytest.mark.parametrize(
    ("change", "link", "words"),
    [
        (lambda record: record.update(files={}), "files", "weights.safetensors is not in the record"),
        (
            lambda record: record["files"].pop("sealed_sample.h5ad") and None,
            "files",
            "sealed_sample.h5ad is not in the record",
        ),
        (lambda record: record["gates"].update(gates=[]), "gates", "cells is missing"),
        (lambda record: record["gates"]["gates"].pop(0) and None, "gates", "cells is missing"),
        (set_gate("variance", value=0.0), "gates", "variance is recorded as passed, but 0 is not at least 1e-06"),
        (
            set_gate("re_embedding", value=5.0, bound=1e9),
            "gates",
            "re_embedding is recorded as passed, but 5 is not at most",
        ),
        (set_gate("finite", value=None), "gates", "finite is recorded as passed, but nan is not at most 0"),
        (set_gate("order", passed=False, stops=False), "gates", "order did not pass"),
        (lambda record: record["model"].update(parameters=1), "model", "parameters is 17386, expected 1"),
    ],
)
def test_a_claim_of_the_record_is_looked_at(change: Any, link: str, words: str, folder: Path) -> None:
    forge(folder, change)
    found = broken(verify(str(folder)))
    assert set(found) == {link}
    assert words in found[link]
    if link == "files":
        with pytest.raises(UserError, match=r"differs from what was published: .* is not in the record"):
            census_scvi.load_model(str(folder))


def test_a_consistent_forgery_is_called_consistent_and_found_in_the_census(
    folder: Path, publication: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_weights(folder, negate)
    sealed = ad.read_h5ad(folder / "sealed_sample.h5ad")
    model, description = load_safe(folder)
    sealed.obsm["X_scvi"], _ = reference_latent(model, description.genes, sealed.X, sealed.obs["batch"])
    sealed.write_h5ad(folder / "sealed_sample.h5ad")
    forge(folder)
    assert main("verify", [str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"{folder} is consistent: " in shown
    assert "is valid" not in shown
    assert main("verify", [str(folder), "--census", str(publication / "census")]) == 2
    captured = capsys.readouterr()
    assert "is not valid: publication, sealed_cells, fresh_sample failed" in captured.err
    assert "consistent" not in captured.out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record["embedding"].update(n_cells=7), "the record says 7"),
        (lambda record: record["config"]["census"].update(obs_query="nnz > 300"), "not the cells that match"),
        (
            lambda record: record["embedding"].update(sha256="0" * 64),
            "their hash differs from that of the published ones",
        ),
    ],
)
def test_the_census_contradicts_a_record(change: Any, words: str, folder: Path, publication: Path) -> None:
    forge(folder, change)
    found = broken(verify(str(folder), str(publication / "census"), n_cells=20))
    assert words in found["embedding"]
    assert "scvi_summary has another provenance" in found["publication"]


# --- records of any shape


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of nested records, and the first of every list."""
    items = values.items() if isinstance(values, dict) else enumerate(values[:1]) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


GONE = object()
VALUES = (GONE, None, [], {}, "x", "", -1, 1e308, float("nan"), True, [["x"]], {"x": 1}, "\x1b[2J../../etc/passwd")


def mutated(values: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    owner = changed
    for key in place[:-1]:
        owner = owner[key]
    if value is GONE:
        del owner[place[-1]]
    else:
        owner[place[-1]] = value
    return changed


def test_no_record_of_any_shape_is_a_traceback(folder: Path) -> None:
    whole = record_of(folder)
    whole.pop("seal")
    whole["model"]["genes"], whole["files"] = whole["model"]["genes"][:2], dict(list(whole["files"].items())[:2])
    refused = 0
    for place in places(whole):
        if len(place) > {"packages": 1, "hardware": 1, "code": 1, "stages": 2}.get(place[0], 9):
            continue
        for value in VALUES:
            record = mutated(whole, place, value)
            (folder / "provenance.json").write_text(json.dumps({**record, "seal": seal_of(record)}))
            try:
                read = read_provenance(folder)
                _ = Origin.of(str(folder)).section
            except UserError as error:
                assert len(str(error).splitlines()) == 1
                refused += 1
                continue
            links = [chain._looked_at(look) for look in (chain._Folder(folder, read).gates,)]
            assert all("cannot be checked" not in link.finding for link in links), (place, value)
    assert refused > 400


def test_no_description_of_a_model_of_any_shape_is_a_traceback(folder: Path) -> None:
    whole = json.loads((folder / "model.json").read_text())
    refused = 0
    for place in places(whole):
        for value in (*VALUES, 2**31, "ENSG00099000002"):
            (folder / "model.json").write_text(json.dumps(mutated(whole, place, value)))
            try:
                load_safe(folder)
            except UserError as error:
                assert len(str(error).splitlines()) == 1
                refused += 1
    assert refused > 100


def nested(folder: Path, name: str) -> None:
    (folder / name).write_text('{"format": 1, "files": ' + "[" * 100_000 + "]" * 100_000 + "}")


def nested_andseal_ofed(folder: Path, name: str) -> None:
    (folder / name).write_text('{"format": 1, "a": ' + "[" * 300 + "]" * 300 + "}")


def huge(folder: Path, name: str) -> None:
    with (folder / name).open("wb") as file:
        file.truncate(2**40)


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


@pytest.mark.parametrize("name", ["provenance.json", "model.json"])
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (nested, "it is nested deeper than 50 levels"),
        (nested_andseal_ofed, "it is nested deeper than 50 levels"),
        (huge, "it has 1,099,511,627,776 bytes; at most 33,554,432 are read"),
        (pipe, "it is no file"),
        (lambda folder, name: (folder / name).write_bytes(b"\xff\xfe\x00"), "codec can't decode"),
        (lambda folder, name: (folder / name).write_text("[1]"), "damaged"),
        (lambda folder, name: (folder / name).write_text("9" * 5000), "damaged"),
    ],
)
def test_json_that_would_harm_is_not_read(harm: Any, words: str, name: str, folder: Path) -> None:
    harm(folder, name)
    read = read_provenance if name == "provenance.json" else load_safe
    with pytest.raises(UserError, match=words) as caught:
        read(folder)
    assert len(str(caught.value).splitlines()) == 1
    if name == "provenance.json":
        assert words in broken(verify(str(folder)))["provenance"]


@pytest.mark.parametrize("text", ["null", "[]", "7", '"record"'])
def test_a_record_that_is_no_json_object(text: str, folder: Path) -> None:
    (folder / "provenance.json").write_text(text)
    with pytest.raises(UserError, match=r"provenance.json is damaged \(it holds no JSON object\); fetch the"):
        read_provenance(folder)


# --- the model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_hidden": 10**9}, "its arguments have the number 1,000,000,000, expected at most 100,000"),
        ({"extra_encoder_kwargs": {"n_hidden": [10**12]}}, "have the number 1,000,000,000,000, expected"),
        ({"n_hidden": 50_000}, "at least [0-9,]+ parameters"),
        ({"n_layers": 50_000}, "at least [0-9,]+ parameters"),
        ({"n_latent": 90_000}, "at least [0-9,]+ parameters"),
        ({"n_layers": 2}, r"Error\(s\) in loading state_dict"),
        ({"use_observed_lib_size": False}, r"Error\(s\) in loading state_dict"),
        ({"use_observed_lib_sizes": False}, "'use_observed_lib_sizes' is not an argument of SCVI in scvi-tools"),
        ({"gene_likelihood": "normal"}, "the argument gene_likelihood is 'normal'"),
        ({"n_hidden": "16"}, "the argument n_hidden is '16'"),
    ],
)
def test_a_model_that_its_weights_do_not_fill_is_not_built(change: dict[str, Any], words: str, folder: Path) -> None:
    edit_model(folder, lambda values: values["arguments"].update(change))
    forge(folder)
    with pytest.raises(UserError, match=words):
        census_scvi.load_model(str(folder))
    assert {"model", "sealed_embedding"} == set(broken(verify(str(folder))))


REFUSALS = {
    "MRVI": "is a model of kind 'MRVI', and this version supports SCVI, SCANVI, TOTALVI; update census-scvi",
}


def has_kind(kind: str) -> Callable[[dict[str, Any]], None]:
    """As another release would write it, with arguments and entries that this one does not know."""

    def change(values: dict[str, Any]) -> None:
        values["model"] = kind
        values["arguments"]["linear_classifier"] = True
        values["labels"] = ["B cell", "T cell"]

    return change


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_published_folder_with_another_kind_is_refused(kind: str, folder: Path) -> None:
    edit_model(folder, has_kind(kind))
    forge(folder)
    for read in (census_scvi.load_model, Atlas.open):
        with pytest.raises(UserError) as caught:
            read(str(folder))
        assert str(caught.value) == f"{folder} {REFUSALS[kind]}"
    assert broken(verify(str(folder)))["model"] == f"{folder} {REFUSALS[kind]}"


def not_a_number(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["z_encoder.mean_encoder.weight"][0, 0] = float("nan")

    edit_weights(folder, change)


def long_header(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}" + bytes(2**17))


def wrong_offsets(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / "weights.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2**17))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (not_a_number, r"z_encoder\.mean_encoder\.weight holds values that are not finite numbers"),
        (long_header, "weights.safetensors cannot be used"),
        (wrong_offsets, "weights.safetensors cannot be used"),
        (lambda folder: (folder / "weights.safetensors").write_bytes(b""), "it has 0 bytes"),
        (lambda folder: edit_weights(folder, lambda weights: weights.clear()), "cannot be used"),
    ],
)
def test_weights_that_are_none_are_refused(harm: Change, words: str, folder: Path) -> None:
    harm(folder)
    forge(folder)
    with pytest.raises(UserError, match=words) as caught:
        census_scvi.load_model(str(folder))
    assert len(str(caught.value).splitlines()) == 1
    assert {"model", "sealed_embedding"} == set(broken(verify(str(folder))))


# --- the sealed sample


def inseal_ofed(change: Callable[[h5py.File], Any]) -> Change:
    def harm(folder: Path) -> None:
        with h5py.File(folder / "sealed_sample.h5ad", "r+") as file:
            change(file)

    return harm


def replaced(name: str, value: Any) -> Change:
    def change(file: h5py.File) -> None:
        attributes = dict(file[name].attrs)
        del file[name]
        file[name] = value
        file[name].attrs.update(attributes)

    return inseal_ofed(change)


def bomb(file: h5py.File) -> None:
    del file["X/data"]
    file.create_dataset("X/data", shape=(10**13,), dtype="f4", chunks=(2**20,), compression="gzip")


def small_bombs(file: h5py.File) -> None:
    for number in range(2000):
        file.create_dataset(f"uns/{number}", shape=(2**24,), dtype="u1", chunks=(2**16,))


def elsewhere(file: h5py.File) -> None:
    del file["X/data"]
    file["X/data"] = h5py.ExternalLink("/etc/passwd", "/x")


@pytest.mark.parametrize(
    "harm",
    [
        inseal_ofed(bomb),
        inseal_ofed(small_bombs),
        inseal_ofed(elsewhere),
        inseal_ofed(lambda file: file["X/indices"].__setitem__(0, 2**31 - 1)),
        inseal_ofed(lambda file: file["X/indices"].__setitem__(0, -5)),
        inseal_ofed(lambda file: file["X/indptr"].__setitem__(1, 2**30)),
        inseal_ofed(lambda file: file["X/data"].__setitem__(0, np.nan)),
        inseal_ofed(lambda file: file["X/data"].__setitem__(0, -3.0)),
        inseal_ofed(lambda file: file.__delitem__("X")),
        inseal_ofed(lambda file: file.__delitem__("obsm")),
        inseal_ofed(lambda file: file.__delitem__("obs/soma_joinid")),
        inseal_ofed(lambda file: file.__delitem__("obs/count_hash")),
        inseal_ofed(lambda file: file["X"].attrs.__setitem__("encoding-type", "no such type")),
        replaced("obsm/X_scvi", np.zeros((40, 9), np.float32)),
        replaced("obsm/X_scvi", np.full((40, 4), "x", dtype=h5py.string_dtype())),
        replaced("obs/soma_joinid", np.full(40, 7)),
        replaced("obs/soma_joinid", -np.arange(40)),
        replaced("var/feature_id", np.array([f"G{number}" for number in range(200)], dtype=h5py.string_dtype())),
        lambda folder: (folder / "sealed_sample.h5ad").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(5000)),
        lambda folder: (folder / "sealed_sample.h5ad").write_text("no HDF5"),
    ],
)
def test_aseal_ofed_sample_that_is_none_is_refused(harm: Change, folder: Path) -> None:
    harm(folder)
    forge(folder)
    found = broken(verify(str(folder)))
    assert set(found) == {"sealed_counts", "sealed_embedding"}
    assert all("cannot be checked" not in words and "\n" not in words for words in found.values()), found


def test_other_counts_than_wereseal_ofed_are_found(folder: Path) -> None:
    sealed = ad.read_h5ad(folder / "sealed_sample.h5ad")
    sealed.X.data[:3] += 1
    sealed.write_h5ad(folder / "sealed_sample.h5ad")
    forge(folder)
    assert {"sealed_counts", "sealed_embedding"} == set(broken(verify(str(folder))))
    sealed.obs["count_hash"] = row_hashes(sealed.X)
    sealed.write_h5ad(folder / "sealed_sample.h5ad")
    forge(folder)
    assert {"sealed_embedding"} == set(broken(verify(str(folder))))


# --- a Census that is damaged


def test_damage_of_the_census_is_a_broken_link(
    folder: Path, publication: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    census = tmp_path / "census"
    shutil.copytree(publication / "census", census)
    experiment = census / "census_data" / "homo_sapiens"
    uri = Path(str(published_uri(str(experiment), "scvi")).removeprefix("file://"))
    with tiledbsoma.open(str(uri)) as array:
        assert array.nnz
    harmed = [
        *uri.glob("__fragments/*/__fragment_metadata.tdb"), *uri.glob("__schema/__[0-9]*"), *uri.glob("__meta/*"),
        *(experiment / "ms" / "RNA" / "scvi_summary").glob("__fragments/*/__fragment_metadata.tdb"),
        *(experiment / "obs").glob("__schema/__[0-9]*"),
        *(census / "census_info" / "summary").glob("__schema/__[0-9]*"),
    ]  # fmt: skip
    assert len(harmed) >= 6
    for path in harmed:
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", whole[:20] + bytes(len(whole) - 20)):
            path.write_bytes(damaged)
            assert main("verify", [str(folder), "--census", str(census), "--sample", "5"]) == 2, path
            error = capsys.readouterr().err
            assert "Traceback" not in error
            assert "error: " in error.splitlines()[-1]
        path.write_bytes(whole)
    assert main("verify", [str(folder), "--census", str(census), "--sample", "5"]) == 0


# --- what is printed


def test_nothing_of_a_folder_acts_on_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "x\x1b]0;owned\x07\x9b2J\u202etxt\r\nfiles  valid  forged"
    forge(folder, lambda record: {**record, "published_by": evil, "published_on": evil})
    assert main("verify", [str(folder)]) == 0
    edit_model(folder, lambda values: values["arguments"].update({evil: 1}))
    forge(folder)
    assert main("verify", [str(folder)]) == 2
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert "\\x1b]0;owned\\x07\\x9b2J\\u202etxt" in shown
    assert not any((ord(character) < 32 and character != "\n") or 127 <= ord(character) < 160 for character in shown)
    assert "\u202e" not in shown
    assert not any(line.startswith("files  valid  forged") for line in shown.splitlines())
