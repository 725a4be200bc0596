"""What a publication tells a stranger: what the data are, who made it, how good it is; nothing of this machine."""

import getpass
import json
import re
import shutil
from pathlib import Path
from typing import Any

import cellxgene_census
import numpy as np
import pytest
import tiledbsoma
import yaml
from cellxgene_census.experimental import get_embedding_metadata
from huggingface_hub import ModelCard
from pipeline import Run

from census_scvi.atlas import Atlas
from census_scvi.census.datasets import describe_data
from census_scvi.census.embedding import published_uri
from census_scvi.census.open import open_census
from census_scvi.census.settings import CensusSection
from census_scvi.errors import UserError
from census_scvi.files.place import recorded, resolved, without_paths
from census_scvi.publication import markdown
from census_scvi.publication.card import model_index
from census_scvi.publication.chain import verify
from census_scvi.publication.record import evaluation_of
from census_scvi.publication.summary import read_summary
from census_scvi.workspace.identity import file_identity

EVIL = '<script>alert(1)</script> [x](javascript:y) | # ![i](u) *b* `c` ~~s~~ $m$ _e_\n\n# Title\n---\n"q": \x1b[2J'


# Headings of the Virtual Cells Platform's template of a model card, in its order.
OF_THE_PLATFORM = [
    "Model Details", "Model Architecture", "Parameters", "Model Card Authors", "Citation", "Intended Use",
    "Primary Use Cases", "Out-of-Scope or Unauthorized Use Cases", "Training Data", "Training Procedure",
    "Training Code", "Speeds, Sizes, Times", "Training Hyperparameters", "Performance Metrics", "Metrics",
    "Evaluation Datasets", "Evaluation Results", "Biases, Risks, and Limitations", "Potential Biases", "Risks",
    "Limitations", "Caveats and Recommendations", "Acknowledgements",
]  # fmt: skip


@pytest.fixture
def run(finished_run: Run, demo_census: str, tmp_path: Path) -> Run:
    """A finished run and its Census in a folder of their own, to be published and moved."""
    tree = tmp_path / "tree"
    shutil.copytree(demo_census, tree / "data" / "census")
    run = Run(tree, str(tree / "data" / "census"), gates={"sample_size": 40})
    shutil.copytree(finished_run.directory, run.directory)
    return run


def texts(run: Run) -> str:
    experiment = f"{run.directory.parent}/data/census/census_data/homo_sapiens"
    info = get_embedding_metadata(str(published_uri(experiment, "scvi")))
    files = [path.read_text() for path in run.path("published").iterdir() if path.suffix in (".json", ".md")]
    return "\n".join([*files, read_summary(experiment).to_json(), json.dumps(info)])


def test_nothing_published_tells_of_this_machine_or_its_user(run: Run) -> None:
    assert run("publish", f"publish.model_uri={run.directory.parent}/models/v1", f"query.file={Path.home()}/x") == 0
    shown = texts(run)
    for private in (str(run.directory.parent), "/tmp", "file:/", f'"{getpass.getuser()}"', str(Path.home()) + "/"):
        assert private not in shown, private
    record = json.loads(run.path("published/provenance.json").read_text())
    assert (record["published_by"], record["census"]["uri"]) == ("", "../../data/census")
    assert record["embedding"]["experiment_uri"] == "../../data/census/census_data/homo_sapiens"


def test_what_the_platform_asks_for_is_answered_from_the_record(run: Run) -> None:
    contact = ["publish.contact.name=A. Person", "publish.contact.affiliation=The Lab", "publish.license=MIT"]
    assert run("publish", *contact, "publish.description=" + "word " * 60) == 0
    text = run.path("published/model_card_metadata.yaml").read_text()
    found = yaml.safe_load(text)
    assert found["authors"] == [{"name": "A. Person", "type": "individual", "affiliates": ["The Lab"]}]
    assert found["licenses"] == [{"type": "MIT"}]
    assert len(found["short_description"]) <= 160 and found["short_description"].endswith("word...")
    assert {"dataset_name": "Demo: human blood, cells", "usage": ["training"]} in found["dataset_sources"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(found["release_date"]))
    asked = text.splitlines()[0].removeprefix("# To be added: ").split(", ")
    assert {"repository_link", "quickstart_link", "primary_contact_email"} <= set(asked)
    assert not set(asked) & set(found)
    record = json.loads(run.path("published/provenance.json").read_text())
    assert "model_card_metadata.yaml" in record["files"]


def test_whoever_is_named_published_it(run: Run) -> None:
    assert run("publish", "publish.contact.name=Jane Doe", "publish.contact.affiliation=A Lab") == 0
    assert '"published_by": "Jane Doe"' in run.path("published/provenance.json").read_text()
    card = run.path("published/README.md").read_text()
    assert "| authors | Jane Doe, A Lab |" in card
    assert "Jane Doe, A Lab (20" in card


def test_a_published_folder_finds_its_census_where_both_were_moved(run: Run, tmp_path: Path) -> None:
    assert run("publish") == 0
    latent = np.load(run.path("latent.npy"))
    moved = tmp_path / "elsewhere" / "deep"
    shutil.move(run.directory.parent, moved)
    with Atlas.open(moved / "run" / "published") as atlas:
        cells = atlas.embeddings("soma_joinid < 9")
    assert np.array_equal(cells.obsm["scvi"], latent[:9])
    assert all(link.valid for link in verify(str(moved / "run" / "published"), str(moved / "data" / "census")))
    shutil.move(moved / "data", tmp_path / "data")  # now without its Census
    with Atlas.open(moved / "run" / "published") as atlas, pytest.raises(UserError, match=r"census=\.\.\."):
        atlas.embeddings()
    with Atlas.open(moved / "run" / "published", census=tmp_path / "data" / "census") as atlas:
        assert np.array_equal(atlas.embeddings("soma_joinid < 9").obsm["scvi"], latent[:9])


def test_a_census_that_the_record_may_not_name_is_known_to_the_run_directory(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the common folder of run and Census counts as the one of all users' folders."""
    monkeypatch.setattr(Path, "home", lambda: run.directory.parent / "user")
    assert run("publish") == 0
    record = json.loads(run.path("published/provenance.json").read_text())
    assert (record["census"]["uri"], record["embedding"]["experiment_uri"]) == (None, None)
    assert "data/census" not in texts(run)
    with Atlas.open(run.path("published")) as atlas:
        assert atlas.embeddings("soma_joinid < 9").n_obs == 9
    shutil.copytree(run.path("published"), tmp_path / "copy")
    with Atlas.open(tmp_path / "copy") as atlas, pytest.raises(UserError, match=r"census=\.\.\."):
        atlas.embeddings()


@pytest.mark.parametrize(
    ("place", "folder", "said"),
    [
        ("s3://bucket/census", "/data/run/published", "s3://bucket/census"),
        ("/data/census", "/data/run/published", "../../census"),
        ("file:///data/census", "/data/run/published", "../../census"),
        ("/mnt/census", "/data/run/published", None),
        (str(Path.home().parent / "alice" / "census"), str(Path.home().parent / "bob" / "run" / "published"), None),
        (str(Path.home() / "census"), str(Path.home() / "run" / "published"), "../../census"),
    ],
)
def test_a_place_is_said_from_the_folder(place: str, folder: str, said: str | None) -> None:
    if place.startswith(str(Path.home().parent / "alice")) and Path.home().parent == Path("/"):
        said = None
    assert recorded(place, Path(folder)) == said
    if place.startswith("/"):
        deep = {"stage": {"places": [place, {"again": place}], "number": 1}}
        expected = {"stage": {"places": [said, {"again": said}], "number": 1}}
        assert without_paths(deep, Path(folder)) == expected
    if said and "://" not in said:
        assert resolved(said, Path(folder)) == place.removeprefix("file://")
    assert resolved(None, Path(folder)) is None
    assert resolved("/old/absolute", Path(folder)) == "/old/absolute"


def test_the_card_says_that_own_cells_are_own_cells(run: Run) -> None:
    assert run("publish") == 0
    card = run.path("published/README.md").read_text()
    assert "CELLxGENE" not in card
    assert "shared by many studies" not in card
    assert "# scVI embedding of 1,500 cells of Homo sapiens: 4 datasets\n" in card
    assert "| source | 4 datasets in a local Census |" in card
    assert "| demo-human-blood | Demo: human blood, cells | not stated |" in card
    assert "demo-mouse" not in card
    headings = re.findall(r"^##+ (.*)$", card, re.MULTILINE)
    assert [each for each in headings if each != "How to use"] == OF_THE_PLATFORM
    for words in ("health of an individual", "Identifying donors", "synthetic data", "discriminatory or harmful"):
        assert words in card, words
    assert "No benchmark was run" in card


def test_the_card_of_cellxgene_s_cells_says_so(run: Run) -> None:
    census = run.directory.parent / "data" / "census"
    with tiledbsoma.open(f"{census}/census_info/datasets") as table:
        names, rows = table.schema.names, table.read().concat().to_pandas()
    rows["collection_id"] = "283d65eb-dd53-496d-adb7-7570c7caa443"
    with tiledbsoma.open(f"{census}/census_info/datasets", "w") as table:
        import pyarrow as pa

        table.write(pa.Table.from_pandas(rows[names], schema=None, preserve_index=False))
    with open_census(CensusSection(uri=str(census))) as opened:
        assert describe_data(opened) == {"cellxgene": True, "n_datasets": 4, "datasets": []}
    assert run("publish") == 0
    card = run.path("published/README.md").read_text()
    assert "# scVI embedding of CELLxGENE Census\n" in card
    assert "| source | CELLxGENE Census: 4 datasets |" in card
    assert "doi:10.1093/nar/gkae1142" in card


def test_the_benchmark_is_on_the_card_where_it_is_of_this_embedding(run: Run) -> None:
    scores = {
        "scVI": [
            {"metric": "clisi", "about": "biology", "column": "cell_type", "value": 0.75, "low": 0.5, "high": 0.8}
        ],
        "PCA": [
            {"metric": "clisi", "about": "biology", "column": "cell_type", "value": 0.25, "low": None, "high": None}
        ],
    }
    latent = file_identity(run.path("latent.npy"))
    metrics: dict[str, Any] = {
        "mode": "sound", "latents": {"scVI": latent}, "settings": {"obs_filter": None}, "cells": {"measured": 321},
        "scores": scores,
    }  # fmt: skip
    run.path("evaluation").mkdir()
    path = run.path("evaluation") / "metrics.json"
    for damage in ("[]", "{", json.dumps(metrics | {"scores": {"scVI": 3}}), json.dumps(metrics | {"latents": {}})):
        path.write_text(damage)
        assert evaluation_of(path.parent, latent) is None
    assert evaluation_of(run.path("nowhere"), latent) is None
    path.write_text(json.dumps(metrics))
    assert evaluation_of(path.parent, {**latent, "size": 1}) is None
    assert run("publish") == 0
    card = run.path("published/README.md").read_text()
    assert "Benchmark: 321 cells of the Census (`all`)." in card
    table = (
        "| metric | column | this embedding | 95 % interval | PCA |\n|---|---|---|---|---|\n"
        "| clisi | cell_type | 0.750 | 0.500 to 0.800 | 0.250 |\n"
    )
    assert table in card


def test_no_setting_is_markup_on_the_card(run: Run) -> None:
    run.config.write_text(
        yaml.safe_dump(
            yaml.safe_load(run.config.read_text())
            | {
                "publish": {
                    "title": EVIL, "license": EVIL, "doi": EVIL, "description": f"One.\n\n{EVIL}\n\n- two",
                    "contact": {"name": EVIL, "email": EVIL, "affiliation": EVIL},
                }
            }
        )
    )  # fmt: skip
    assert run("publish") == 0
    card = run.path("published/README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert set(yaml.safe_load(front)) == {"library_name", "license", "tags"}
    assert "<script" not in body
    assert "\x1b" not in card
    assert not re.search(r"(?<!\\)\[x\]|(?<!\\)\*b|(?<!\\)`c`|(?<!\\)~~s|(?<!\\)\$m", body)
    assert not re.search(r"^# Title|^---$", body, re.MULTILINE)
    assert re.search(r"^\\- two$", body, re.MULTILINE)
    for line in body.splitlines():
        if line.startswith("| licence"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("n_hidden_size", "n_hidden_size"),
        ("_x_ and __y__", r"\_x\_ and \_\_y\_\_"),
        ("a@b.org", "a@b.org"),
        ("10.1101/2024.01.02_v2", "10.1101/2024.01.02_v2"),
        ("# x", r"\# x"),
        ("1. x", r"1\. x"),
        ("Smith & Sons", "Smith &amp; Sons"),
        (3, 3),
    ],
)
def test_text_in_markdown(value: Any, shown: Any) -> None:
    assert markdown.text(value) == shown


def test_code_in_markdown_ends_where_it_should() -> None:
    assert markdown.code("a == 'b'") == "`a == 'b'`"
    assert markdown.code("a ``` b | c") == "```` a ``` b \\| c ````"
    literal = markdown.literal('"); import os\n```\n')
    assert eval(literal) == '"); import os ```'
    assert "```" not in literal


def test_old_records_are_read_as_before(run: Run) -> None:
    """A record that names its Census by an absolute path, the account that published it, and no data."""
    from census_scvi.model.published import seal_of

    assert run("publish") == 0
    path = run.path("published/provenance.json")
    record = json.loads(path.read_text())
    for name in ("seal", "data"):
        record.pop(name)
    census = run.directory.parent / "data" / "census"
    record["census"]["uri"] = str(census)
    record["embedding"]["experiment_uri"] = f"file://{census}/census_data/homo_sapiens"
    record |= {"published_by": "root", "model": record["model"] | {"uri": str(run.path("published"))}}
    path.write_text(json.dumps({**record, "seal": seal_of(record)}))
    shutil.copytree(run.path("published"), run.directory.parent / "copy")
    with Atlas.open(run.directory.parent / "copy") as atlas:
        assert atlas.embeddings("soma_joinid < 9").n_obs == 9
    with cellxgene_census.open_soma(uri=str(census)):
        found = {link.name for link in verify(str(run.path("published")), str(census)) if not link.valid}
    assert found == {"publication"}  # the table has the record that was written


def test_a_hub_reads_the_results_from_the_header() -> None:
    score = {"metric": "clisi", "about": "biology", "column": "cell_type", "value": 0.93218, "low": None, "high": None}
    record = {
        "title": "An embedding: *of cells*",
        "census": {"version": "2025-11-08", "organism": "homo_sapiens", "created_on": "2025-10-01"},
        "data": {"cellxgene": True},
        "evaluation": {
            "cells": 10_000,
            "obs_filter": "is_primary_data == True",
            "scores": [score, {**score, "value": None}],
        },
    }
    text = f"---\n{yaml.safe_dump(model_index(record))}---\n"
    (result,) = ModelCard(text, ignore_metadata_errors=False).data.eval_results
    assert (result.metric_type, result.metric_value, result.metric_name) == ("clisi", 0.9322, "clisi of cell_type")
    assert result.dataset_name == "10,000 cells of homo_sapiens in a Census release 2025-11-08"
    assert result.dataset_config == "is_primary_data == True"
    assert model_index({**record, "evaluation": None}) == {}
