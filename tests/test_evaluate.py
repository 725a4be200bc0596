"""scvi-evaluate.py: from a run and a Census to metrics.json and a report that opens anywhere."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import Run

from census_scvi.census import ontology
from census_scvi.census.open import open_census
from census_scvi.cli import main
from census_scvi.errors import UserError
from census_scvi.publication.record import evaluation_of
from census_scvi.report import html
from census_scvi.report.groups import same_groups
from census_scvi.report.slice import read_slice
from census_scvi.settings import load_config
from census_scvi.stages.evaluate import evaluate
from census_scvi.workspace.identity import file_identity

QUICK = ("evaluate.measured_cells=500", "evaluate.batches=[dataset_id, batch]")


def evaluation(run: Run, folder: Path, *settings: str) -> int:
    return main("evaluate", ["--config", str(run.config), f"evaluate.folder={folder}", *QUICK, *settings])


@pytest.fixture(scope="module")
def evaluated(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    assert evaluation(finished_run, folder) == 0
    return folder


def recorded(directory: Path, **arrays: np.ndarray) -> None:
    """Other arrays in a run directory, as if create-latent-update had written them."""
    manifest = json.loads((directory / "manifest.json").read_text())
    outputs = manifest["stages"]["create-latent-update"]["outputs"]
    for name, values in arrays.items():
        file = f"{name.replace('_', '-')}.npy"
        np.save(directory / file, values)
        outputs[file] = file_identity(directory / file)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def values(record: dict[str, Any], space: str, column: str) -> dict[str, float]:
    return {score["metric"]: score["value"] for score in record["scores"][space] if score["column"] == column}


def test_every_row_of_the_benchmark(evaluated: Path, finished_run: Run) -> None:
    record = metrics_of(evaluated)
    assert list(record["scores"]) == ["PCA", "scVI"]
    for space in record["scores"]:
        of_label, of_batch = values(record, space, "cell_type"), values(record, space, "dataset_id")
        classifiers = {"classifier_svm", "classifier_forest", "classifier_lr"}
        biology = {"leiden_nmi", "leiden_ari", "silhouette_label", "clisi", "isolated_labels"}
        of_terms = {"hierarchical_precision", "hierarchical_recall", "hierarchical_f1", "right_or_ancestor"}
        assert set(of_label) == biology | classifiers | of_terms
        assert of_label["classifier_lr"] <= of_label["right_or_ancestor"] <= 1
        assert of_label["hierarchical_f1"] > of_label["classifier_lr"] or of_label["classifier_lr"] == 1
        assert {"silhouette_batch", "entropy", "entropy_scaled", "ilisi", "kbet"} | classifiers == set(of_batch)
        assert set(values(record, space, "batch")) == set(of_batch)
    for scores in record["scores"].values():
        for score in scores:
            assert score["levels"], score["metric"]
            assert np.isfinite(score["value"])
    assert record["problems"] == []
    assert record["cells"]["measured"] == 500
    assert record["cells"]["evaluated"] == record["cells"]["matching"] > 1000
    assert set(record["breakdown"]["scVI"]) == {"cell_type", "dataset_id"}
    types = pd.DataFrame(record["breakdown"]["PCA"]["cell_type"])
    assert types["cells"].sum() == record["cells"]["evaluated"]
    assert types[["same_type", "silhouette"]].apply(lambda column: column.between(0, 1)).all().all()
    svm = [score for score in record["scores"]["scVI"] if score["metric"] == "classifier_svm"]
    assert {score["note"] for score in svm if score["about"] == "biology"} == {"classifiers: donors held out"}


def test_scores_in_the_form_of_cz_benchmarks(evaluated: Path) -> None:
    """Its `MetricResult` has a type from a fixed list, a number, and parameters by name."""
    found, record = json.loads((evaluated / "cz-benchmarks.json").read_text()), metrics_of(evaluated)
    of_label = {"normalized_mutual_info", "adjusted_rand_index", "silhouette_score", "mean_fold_accuracy"}
    assert list(found) == list(record["scores"])
    for space, results in found.items():
        assert {result["metric_type"] for result in results} == of_label | {"entropy_per_cell", "batch_silhouette"}
        assert all(set(result) == {"metric_type", "value", "params"} for result in results)
        for metric, name, column in (
            ("leiden_ari", "adjusted_rand_index", "cell_type"),
            ("entropy_scaled", "entropy_per_cell", "dataset_id"),
        ):
            (same,) = [
                result["value"]
                for result in results
                if result["metric_type"] == name and column in result["params"].values()
            ]
            assert same == values(record, space, column)[metric]
        classifiers = [r["params"]["classifier"] for r in results if r["metric_type"] == "mean_fold_accuracy"]
        assert sorted(classifiers) == ["forest", "lr", "svm"]  # of the label alone: for a batch they score 1 - accuracy
    definitions = record["definitions"]
    assert set(definitions) == {score["metric"] for scores in record["scores"].values() for score in scores}
    assert definitions["ilisi"] == f"scib-metrics {record['packages']['scib-metrics']}"
    assert definitions["entropy"] == "census-scvi 1"


def test_run_again_gives_the_same(
    evaluated: Path, finished_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluation(finished_run, tmp_path / "again", "evaluate.batches=[dataset_id]") == 0
    again, first = metrics_of(tmp_path / "again"), metrics_of(evaluated)
    assert list(again["scores"]) == list(first["scores"])
    for space, scores in first["scores"].items():
        before = [score for score in scores if score["column"] != "batch"]
        for score, other in zip(before, again["scores"][space], strict=True):
            assert score["value"] == pytest.approx(other["value"], abs=1e-6), score["metric"]
    assert evaluation(finished_run, evaluated) == 0
    assert f"evaluate is done for these settings in {evaluated}" in capsys.readouterr().err
    assert evaluation(finished_run, evaluated, "evaluate.measured_cells=299") == 2
    assert (
        "holds a finished evaluate for other settings: evaluate.measured_cells was 500 and is 299; set it back, use"
        " another evaluate.folder, or --force to run it again" in capsys.readouterr().err
    )
    earlier = tmp_path / "earlier"  # a version that kept no record
    shutil.copytree(evaluated, earlier)
    (earlier / "manifest.json").unlink()
    assert evaluation(finished_run, earlier) == 2
    assert "report.html exists; set another evaluate.folder, or replace it with --force" in capsys.readouterr().err


def test_the_report_is_one_file(evaluated: Path) -> None:
    page = (evaluated / "report.html").read_text()
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:|#)", page)
    assert "http" not in re.sub(r"data:[^\"']+", "", page).replace("http-equiv", "")
    assert page.count("data:image/png;base64,") >= 9  # four maps of two embeddings, and the learning curves
    for title in ("Biological conservation", "Batch mixing", "Scores by type and batch", ">Training<"):
        assert title in page
    assert len(page) < 5_000_000


def test_shuffled_cells_are_at_chance(finished_run: Run) -> None:
    config = load_config(finished_run.config, ["evaluate.batches=[dataset_id]"])
    with open_census(config.census) as census:
        cells = read_slice(
            census,
            config.evaluate,
            config.directory,
            batch_key=config.anndata.batch_key,
            n_genes=config.hvg.top_n_hvg,
            seed=config.seed,
        )
    order = np.random.default_rng(5).permutation(len(cells.obs))
    cells.spaces = {"shuffled": cells.spaces["scVI"][order]}
    for score in evaluate(config, cells, np.arange(len(cells.obs))).scores["shuffled"]:
        level = score.levels["chance" if score.about == "biology" else "perfectly mixed"]
        if score.metric.startswith("classifier"):  # at chance it does as well as guessing the commonest, or worse
            assert score.value < level + 0.03 if score.about == "biology" else score.value > level - 0.03, score
        else:
            assert score.value == pytest.approx(level, abs=0.08), score.metric


def test_several_embeddings_stand_side_by_side(finished_run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished_run.directory, other)
    latent = np.load(other / "latent.npy")
    recorded(other, latent=latent + np.random.default_rng(0).normal(size=latent.shape).astype(np.float32) * 3)
    named = f"evaluate.embeddings={{ours: {finished_run.directory}, noisy: {other}, none: {tmp_path}/nowhere}}"
    settings = ("evaluate.baseline=false", "evaluate.max_cells=400", "evaluate.batches=[]")
    assert evaluation(finished_run, tmp_path / "out", named, *settings) == 0
    record = metrics_of(tmp_path / "out")
    assert list(record["scores"]) == ["ours", "noisy"]
    assert values(record, "ours", "cell_type")["leiden_nmi"] > values(record, "noisy", "cell_type")["leiden_nmi"]
    assert any(problem.startswith("none: ") for problem in record["problems"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Evaluation of ours, noisy" in page
    assert "Not everything could be measured" in page


def test_what_cannot_be_measured_is_said_and_the_rest_is_there(finished_run: Run, tmp_path: Path) -> None:
    """A column that is not there, a label of one class, an embedding with NaN and with cells missing."""
    other = tmp_path / "other"
    shutil.copytree(finished_run.directory, other)
    latent, joinids = np.load(other / "latent.npy"), np.load(other / "latent-idx.npy")
    latent[25:28] = np.nan
    recorded(other, latent=latent[20:], latent_idx=joinids[20:])
    settings = (
        f"evaluate.embeddings={{damaged: {other}}}",
        "evaluate.labels=[cell_typ, development_stage, cell_type]",
        "evaluate.batches=[dataset_id, lane]",
        "evaluate.donors=patient",
        "evaluate.baseline=false",
    )
    assert evaluation(finished_run, tmp_path / "out", *settings) == 0
    record = metrics_of(tmp_path / "out")
    problems = "\n".join(record["problems"])
    assert (
        "evaluate.labels contains 'cell_typ', which is not an obs column of the Census; did you mean cell_type?"
        in problems
    )
    assert "evaluate.batches contains 'lane', which is not an obs column" in problems
    assert (
        "evaluate.donors contains 'patient', which is not an obs column of the Census; cells are held out" in problems
    )
    assert "development_stage has too few usable values, 1 (known, with at least 10 measured cells)" in problems
    assert re.search(r"damaged has no finite position for \d cells; they are excluded for all embeddings", problems)
    assert re.search(r"damaged lacks \d+ of the cells; they are excluded for all embeddings", problems)
    assert values(record, "damaged", "cell_type")["leiden_nmi"] > 0
    assert values(record, "damaged", "dataset_id")["entropy"] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "did you mean cell_type?" in page


def test_what_stops_it(finished_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluation(finished_run, tmp_path, "evaluate.obs_filter=nnz > 1000000") == 2
    assert "evaluate.obs_filter 'nnz > 1000000' matches no cell of" in capsys.readouterr().err
    assert evaluation(finished_run, tmp_path, "evaluate.embeddings={it: other_name}") == 2
    assert "has no obsm['other_name']" in capsys.readouterr().err
    for directory, found in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "has no manifest.json, so no stage ran"),
    ):
        for arguments in ((), ("--dry-run",)):
            assert evaluation(finished_run, tmp_path / "out", f"output.directory={directory}", *arguments) == 2
            message = capsys.readouterr().err
            assert f"run directory {directory} {found}" in message
            assert "give the run in output.directory, or embeddings in evaluate.embeddings" in message
    named = f"evaluate.embeddings={{it: {tmp_path}/none/run}}"
    assert evaluation(finished_run, tmp_path / "out", named) == 2
    assert "none/run does not exist; give a run directory, an Experiment, or a name in obsm" in capsys.readouterr().err
    for mode, code in (("legacy", 2), ("sound", 0)):
        assert evaluation(finished_run, tmp_path, f"evaluate.mode={mode}", "--dry-run") == code
        assert "command line: evaluate.mode " in capsys.readouterr().err


@pytest.mark.parametrize("n_cells", [1, 2, 3])
def test_few_cells(n_cells: int, finished_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured where something can be, else refused; never a library's traceback."""
    code = evaluation(finished_run, tmp_path, f"evaluate.obs_filter=soma_joinid < {n_cells}")
    if code == 0:
        record = metrics_of(tmp_path)
        assert record["cells"]["measured"] == n_cells
        assert any(record["scores"].values())
    else:
        assert (code, n_cells) == (2, 1)
        assert f"nothing can be measured on {n_cells} cells: " in capsys.readouterr().err.splitlines()[-1]
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_says_the_same_is_there_once(finished_run: Run, tmp_path: Path) -> None:
    """A batch that is the dataset, and columns of one value, are said and neither measured nor drawn again."""
    settings = (
        "anndata.batch_key=[dataset_id]",
        "evaluate.max_cells=400",
        "evaluate.labels=[cell_type, sex]",
        "evaluate.batches=[dataset_id, batch, development_stage]",
        "evaluate.baseline=false",
    )
    assert evaluation(finished_run, tmp_path, *settings) == 0
    record = metrics_of(tmp_path)
    assert record["same_as"] == {"batch": "dataset_id"}
    assert {score["column"] for score in record["scores"]["scVI"]} == {"cell_type", "sex", "dataset_id"}
    page = (tmp_path / "report.html").read_text()
    headings = re.findall(r"<h3>(.*?)</h3>", page)
    same = '<span class="soft">and batch: the same groups of cells</span>'
    assert f"dataset_id {same}" in headings
    assert f"By dataset id {same}" in headings
    assert not any(heading.startswith(("batch", "By batch", "By development")) for heading in headings)
    assert re.search(r"No UMAP by (.*, )?development stage \(.+\).*: all measured cells have the same value\.", page)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy")), min_size=1, max_size=12))
def test_same_groups(cells: list[tuple[str, str]]) -> None:
    one, other = ([values[n] for values in cells] for n in (0, 1))
    renamed = [{"a": None, "b": 1.5, "c": "b"}[name] for name in one]
    pairs = len(set(cells))
    equal = len(set(one)) == len(set(other)) == pairs
    expected = {"renamed": "one"} | ({"other": "one"} if equal else {})
    assert same_groups({"one": one, "other": other, "renamed": renamed}) == expected


def test_damaged_gates_are_said(finished_run: Run, tmp_path: Path) -> None:
    config = load_config(finished_run.config, [f"output.directory={tmp_path}"])
    for text in ("{", "[]", '{"gates": 3}'):
        (tmp_path / "qa.json").write_text(text)
        with pytest.raises(UserError, match=r"qa.json is damaged"):
            html._gates(config.directory)


def test_dry_run(finished_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluation(finished_run, tmp_path / "out", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "# evaluate would" in shown
    assert "out/report.html" in shown
    assert "500 cells are measured" in shown
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def of_slice(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of 400 cells without a run, by classes of the Cell Ontology; an embedding cannot be reached."""
    folder = tmp_path_factory.mktemp("slice")
    there = f"it: {finished_run.directory}"
    settings = (
        f"evaluate.embeddings={{{there}, theirs: 'file://me:secret@localhost/nowhere?key=secret'}}",
        f"output.directory={folder}/none",
        "evaluate.max_cells=400",
        "evaluate.labels=[cell_subclass, cell_class]",
        "evaluate.batches=[assay]",
    )
    assert evaluation(finished_run, folder, *settings) == 0
    return folder


def test_a_slice_is_drawn_where_more_cells_match(of_slice: Path) -> None:
    record = metrics_of(of_slice)
    assert record["cells"]["evaluated"] == record["cells"]["measured"] == 400
    assert "sampled at random from" in (of_slice / "report.html").read_text()


def test_without_a_run_the_pca_takes_variable_genes(of_slice: Path) -> None:
    assert values(metrics_of(of_slice), "PCA", "cell_subclass")["leiden_nmi"] > 0.1
    assert ">Training<" not in (of_slice / "report.html").read_text()


def test_no_credentials_are_written(of_slice: Path) -> None:
    """An embedding that cannot be reached is named in the report, and how to repeat it."""
    for name in ("metrics.json", "report.html"):
        text = (of_slice / name).read_text()
        assert "theirs" in text
        assert "secret" not in text


def test_classes_of_the_cell_ontology(of_slice: Path) -> None:
    terms = pd.Series(["CL:0000236", "CL:0000624", "CL:0000057", "unknown", "CL:9999999", "CL:0000236"])
    found = ontology.classes_of(terms, "cell_class").tolist()
    blood = "hematopoietic cell"
    assert found == [blood, blood, "connective tissue cell", None, None, blood]
    expected = ["B cell", "CD4-positive, alpha-beta T cell", "stromal cell", None, None, "B cell"]
    assert ontology.classes_of(terms, "cell_subclass").tolist() == expected
    assert values(metrics_of(of_slice), "it", "cell_subclass")["leiden_nmi"] > 0.1


# --- in a browser


def test_a_publication_of_the_embedding_that_was_measured_shows_it(evaluated: Path, finished_run: Run) -> None:
    latent = file_identity(finished_run.path("latent.npy"))
    found, record = evaluation_of(evaluated, latent), metrics_of(evaluated)
    assert found is not None
    assert [score["value"] for score in found["scores"]] == [score["value"] for score in record["scores"]["scVI"]]
    assert [score["others"]["PCA"] for score in found["scores"]] == [
        score["value"] for score in record["scores"]["PCA"]
    ]
    assert evaluation_of(evaluated, {**latent, "sha256": ["0" * 64]}) is None


@pytest.fixture(scope="module")
def page(evaluated: Path) -> Iterator[tuple[Any, list[str]]]:
    """The report in headless Chromium, and what it complains of."""
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs a Chromium to open the report in: install chromium or google-chrome")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(offline=True)
        opened, complaints = context.new_page(), []
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("requestfailed", lambda request: complaints.append(request.url))
        opened.goto(f"file://{evaluated}/report.html")
        yield opened, complaints
        browser.close()


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desk", "phone"])
def test_the_report_in_a_browser(page: tuple[Any, list[str]], width: int, height: int, tmp_path: Path) -> None:
    opened, complaints = page
    opened.set_viewport_size({"width": width, "height": height})
    sizes = opened.eval_on_selector_all("img", "images => images.map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(sizes) >= 9
    assert all(complete and natural > 100 for complete, natural, _ in sizes)
    assert all(0 < shown <= width for _, _, shown in sizes)
    # nothing is wider than the window but what scrolls in itself
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    opened.screenshot(path=str(tmp_path / "report.png"), full_page=True)
    assert (tmp_path / "report.png").stat().st_size > 50_000
    assert complaints == []


def test_the_report_in_print(page: tuple[Any, list[str]]) -> None:
    opened, _ = page
    assert opened.pdf(format="A4").startswith(b"%PDF")
    opened.emulate_media(media="print")
    assert not opened.is_visible("nav")
    opened.emulate_media(media="screen")
