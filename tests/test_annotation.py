"""Annotation of a query: combined and calibrated probabilities, held-out validation, cells of missing types."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import ROOT

from census_scvi.annotation.annotate import FittedMethod, annotate
from census_scvi.annotation.annotate_labels import annotate_labels
from census_scvi.annotation.annotators.neighbor_vote import neighbor_vote
from census_scvi.annotation.labelled.genes import variable_genes
from census_scvi.annotation.labelled.joined import Joined
from census_scvi.annotation.labelled.several_values import split_labels
from census_scvi.annotation.ontology import build_hierarchy, term_columns
from census_scvi.annotation.protocol import Annotation, Cells
from census_scvi.annotation.unknown.rule import Batch, HeldOutCells, apply_rule, set_rule
from census_scvi.annotation.unknown.type_distances import TypeDistances
from census_scvi.annotation.validation.calibration import fit_temperature, with_temperature
from census_scvi.annotation.validation.folds import held_out_folds
from census_scvi.errors import UserError

N_GENES, NAMES = 120, np.array(["B cell", "T cell", "monocyte", "NK cell"], dtype=object)


def simulated(
    n_cells: int = 600, seed: int = 0, query_share: tuple[float, ...] = (0.25,) * 4
) -> tuple[Cells, np.ndarray]:
    """Two studies and a query of two batches, four types with thirty genes of their own; labels of all cells."""
    generator = np.random.default_rng(seed)
    n_reference = n_cells * 2 // 3
    codes = generator.choice(4, n_cells, p=(0.25,) * 4)
    codes[n_reference:] = generator.choice(4, n_cells - n_reference, p=query_share)
    batch = np.repeat(["one", "two", "lane 1", "lane 2"], [n_reference // 2, n_reference - n_reference // 2, 0, 0])
    lanes = np.where(np.arange(n_cells - n_reference) % 2, "lane 1", "lane 2")
    batch = np.append(batch, lanes).astype(object)
    genes = np.arange(N_GENES)
    rates = np.where(genes // 30 == codes[:, None], 4.0, 1.0)
    rates *= np.where(genes[None, :] % 4 == np.unique(batch, return_inverse=True)[1][:, None], 1.5, 1.0)
    counts = sp.csr_matrix(generator.poisson(rates * generator.uniform(0.5, 2, (n_cells, 1))).astype(np.float32))
    return Cells(counts, batch, n_reference, [f"gene{n}" for n in genes]), NAMES[codes]


def studies(cells: Cells) -> dict[str, np.ndarray]:
    return {"dataset_id": cells.batch[: cells.n_reference]}


def fast(cells: Cells, labels: np.ndarray, **units: np.ndarray) -> Annotation:
    return annotate(cells, labels[: cells.n_reference], units or studies(cells), method="fast")


@pytest.mark.parametrize("known_studies", [True, False])
def test_a_cell_with_several_values_counts_for_each(known_studies: bool) -> None:
    cells, labels = simulated()
    given = labels[: cells.n_reference].copy()
    given[:200:2] = given[:200:2] + " || rash"  # a symptom without genes of its own
    given[7] = None
    joined = Joined(
        cells, {"disease": given, "type": labels[: cells.n_reference]}, studies(cells) if known_studies else {},
        cells.query, True, cells.genes, {"disease": {}, "type": {}},
    )  # fmt: skip
    split = split_labels(joined)
    assert split.cells.n_reference == cells.n_reference + 100
    assert set(split.labels["disease"]) == {*NAMES, "rash", None}
    assert (split.labels["disease"] == "rash").sum() == 100
    assert (split.cells.counts[-200:] != cells.counts[-200:]).nnz == 0
    pairs = pd.DataFrame({"type": split.labels["type"], "disease": split.labels["disease"]}).dropna()
    pairs = pairs[pairs["disease"] != "rash"]
    assert (pairs["type"] == pairs["disease"]).all()
    if not known_studies:  # both copies of a cell are held out together
        codes = np.unique(split.labels["disease"].astype(str), return_inverse=True)[1]
        folds, name = held_out_folds(codes, split.units, 0)
        assert (len(folds), name) == (3, "cells")
        rows = split.units["cells"]
        assert not any(set(rows[fold.train]) & set(rows[fold.test]) for fold in folds)
    disease, of_type = annotate_labels(split, "fast")
    assert disease.annotation.classes == sorted([*NAMES, "rash"])
    assert (disease.annotation.labels == labels[cells.n_reference :]).mean() > 0.9
    assert (of_type.annotation.labels == labels[cells.n_reference :]).mean() > 0.95
    assert split_labels(split) is split


def test_labels_members_and_the_table_of_held_out_studies() -> None:
    cells, labels = simulated()
    found = fast(cells, labels)
    truth = labels[cells.n_reference :]
    assert found.classes == sorted(NAMES)
    assert (found.labels == truth).mean() > 0.95
    assert set(found.members) == {"harmony", "logistic_regression"}
    np.testing.assert_allclose(found.probability, np.mean(list(found.members.values()), axis=0), atol=1e-6)
    np.testing.assert_allclose(found.probability.sum(axis=1), 1, atol=1e-5)
    assert list(found.validation.index) == ["fast", "harmony", "logistic_regression", "pca"]
    assert (found.validation["accuracy"] > 0.9).all()
    assert (found.validation["calibration_error"] < 0.1).all()
    assert found.facts["held_out_by"] == "dataset_id"
    assert (~found.unknown).mean() > 0.85
    assert found.groups.shape == found.uncertainty.shape == truth.shape
    assert ((found.uncertainty > 0.5) == found.unknown).all()
    assert {name: batch["cells"] for name, batch in found.facts["batches"].items()} == {"lane 1": 100, "lane 2": 100}
    again = fast(cells, labels)
    assert np.array_equal(found.probability, again.probability)
    assert np.array_equal(found.unknown, again.unknown)


def test_undecided_labels_get_the_name_of_what_they_have_in_common() -> None:
    """CD4 or CD8 is chance here: the held-out labels are often wrong, their common name, "T cell", is right."""
    cells, labels = simulated()
    generator = np.random.default_rng(0)
    true_t = labels == "T cell"
    labels[true_t] = generator.choice(["CD4 T", "CD8 T"], true_t.sum())
    terms = {"CD4 T": "CL:0000624", "CD8 T": "CL:0000625", "NK cell": "CL:0000623"}
    found = annotate(cells, labels[: cells.n_reference], studies(cells), terms, method="fast")
    scores = found.validation.loc["fast"]
    assert 0.8 < scores["accuracy"] == scores["right_or_ancestor"] < 0.95
    assert scores["hierarchical_f1"] > scores["accuracy"] + 0.03
    columns = term_columns(
        build_hierarchy(found.classes, terms),
        "cell_type",
        found.probability,
        found.unknown,
        found.facts["name_threshold"],
    )
    known = ~found.unknown
    names = np.asarray(columns["cell_type_ontology"])[known]
    in_common = names[true_t[cells.n_reference :][known]]
    assert (in_common == "T cell").mean() > 0.7
    others = names[~true_t[cells.n_reference :][known]]
    assert (others == labels[cells.n_reference :][known & ~true_t[cells.n_reference :]]).mean() > 0.9


@pytest.mark.parametrize(("query_share", "known"), [((0.25,) * 4, 0.85), ((0.1, 0.2, 0.1, 0.6), 0.8)])
def test_a_type_that_the_reference_lacks_is_unknown(query_share: tuple[float, ...], known: float) -> None:
    cells, labels = simulated(900, query_share=query_share)
    kept = np.append(labels[:600] != "NK cell", np.ones(300, bool))
    without = Cells(cells.counts[kept], cells.batch[kept], int(kept[:600].sum()), cells.genes)
    found = fast(without, labels[kept])
    missing = labels[600:] == "NK cell"
    assert found.unknown[missing].mean() > 0.8
    assert (~found.unknown[~missing]).mean() > known
    assert found.facts["left_out_found"] > 0.8
    assert found.facts["frequent_left_out_found"] > 0.6
    assert found.facts["known_kept"] > 0.9


def test_a_query_of_a_missing_type_alone_is_a_warning() -> None:
    cells, labels = simulated(900, query_share=(0, 0, 0, 1))
    kept = np.append(labels[:600] != "NK cell", np.ones(300, bool))
    found = fast(Cells(cells.counts[kept], cells.batch[kept], int(kept[:600].sum()), cells.genes), labels[kept])
    assert all(batch["far"] for batch in found.facts["batches"].values())
    assert any("check their labels with marker genes" in warning for warning in found.warnings)
    complete = fast(*simulated(900))
    assert not any(batch["far"] for batch in complete.facts["batches"].values())
    assert not any("marker genes" in warning for warning in complete.warnings)


def test_permuted_labels_score_at_chance() -> None:
    cells, labels = simulated()
    permuted = np.append(np.random.default_rng(1).permutation(labels[:400]), labels[400:])
    found = fast(cells, permuted)
    assert (found.validation["accuracy"] < 0.4).all()
    assert found.probability.max(axis=1).mean() < 0.5


@pytest.mark.parametrize(
    ("units", "held_out_by", "warning"),
    [
        ({"dataset_id": "one", "donor_id": ["a", "b"]}, "donor_id", "measured on values of donor_id of the same study"),
        ({"dataset_id": "one", "donor_id": "a"}, "cells", "measured on random cells of the same study"),
    ],
)
def test_a_single_study_is_validated_by_donors_or_cells(units: dict, held_out_by: str, warning: str) -> None:
    cells, labels = simulated()
    columns = {name: np.resize(np.array(values, dtype=object), 400) for name, values in units.items()}
    found = fast(cells, labels, **columns)
    assert found.facts["held_out_by"] == held_out_by
    assert any(warning in text for text in found.warnings)


def test_awkward_labels() -> None:
    cells, labels = simulated()
    reference = labels[:400].copy()
    with pytest.raises(UserError, match="none of the 400 reference cells has a label"):
        annotate(cells, np.full(400, None, dtype=object), method="fast")
    one = annotate(cells, np.full(400, "B cell", dtype=object), studies(cells), method="fast")
    assert set(one.labels) == {"B cell"}
    assert one.validation.empty
    assert any("nothing could be held out" in text for text in one.warnings)
    reference[:] = np.where(reference == "monocyte", None, reference)  # unlabelled cells teach nothing
    reference[0] = "platelet"  # a type with one cell
    found = annotate(cells, reference, studies(cells), method="fast")
    assert found.classes == ["B cell", "NK cell", "T cell", "platelet"]
    known = np.isin(labels[400:].astype(str), found.classes)
    assert (found.labels == labels[400:])[known].mean() > 0.95
    assert np.isfinite(found.probability).all()
    numbers = annotate(cells, np.unique(labels[:400].astype(str), return_inverse=True)[1].astype(object), method="fast")
    assert numbers.classes == ["0", "1", "2", "3"]
    apart = annotate(  # each study has types of its own: cells are held out instead
        cells,
        np.where(cells.batch[:400] == "one", reference == "B cell", 7).astype(object),
        studies(cells),
        method="fast",
    )
    assert apart.facts["held_out_by"] == "cells"


def test_cells_without_counts_are_unknown() -> None:
    cells, labels = simulated()
    counts = cells.counts.tolil()
    counts[410:420] = 0
    found = fast(Cells(counts.tocsr(), cells.batch, 400, cells.genes), labels)
    assert found.unknown[10:20].all()
    assert (found.uncertainty[10:20] == 1).all()
    assert np.isfinite(found.probability).all()


def test_a_query_without_batches_gets_no_harmony() -> None:
    cells, labels = simulated(300)
    method = FittedMethod(cells, "fast", batches_known=False)
    assert method.members == ("pca", "logistic_regression")
    found = method.annotate(labels[:200], studies(cells))
    assert any("set query.batch_key" in text for text in found.warnings)
    # The same annotators serve another column of labels.
    other = method.annotate(np.where(labels[:200] == "B cell", "B", "other").astype(object), studies(cells))
    assert other.classes == ["B", "other"]


@settings(deadline=None, max_examples=30)
@given(st.floats(0.4, 2.5))
def test_a_temperature_is_found_again(temperature: float) -> None:
    generator = np.random.default_rng(0)
    calibrated = generator.dirichlet(np.ones(4), 20_000).astype(np.float32)
    codes = (calibrated.cumsum(axis=1) < generator.random((20_000, 1))).sum(axis=1).clip(max=3)
    distorted = with_temperature(calibrated, temperature)
    assert fit_temperature(distorted, codes) == pytest.approx(1 / temperature, rel=0.1)
    assert np.array_equal(distorted.argmax(axis=1), calibrated.argmax(axis=1))


@pytest.mark.parametrize("distances", [TypeDistances.to_nearest, TypeDistances.to_means])
def test_distances_relative_to_a_type(distances: Callable[..., TypeDistances]) -> None:
    generator = np.random.default_rng(0)
    dense, wide = generator.normal(0, 0.1, (50, 2)), generator.normal(0, 1, (50, 2)) + 20
    space = np.concatenate([dense, wide, [[0.6, 0.6], [21.5, 21.5]]]).astype(np.float32)
    found = distances(space, np.arange(100), np.repeat([0, 1], 50), 3, np.array([100, 101]))
    assert np.isinf(found.to_type[:, 2]).all()
    near, far = found.score()
    assert near > far  # outside of the dense type, within the wide one
    without = found.score(without=0)
    assert without[0] > 1 + near
    assert without[1] == far


def test_the_distance_to_means_follows_the_shape_of_the_types() -> None:
    generator = np.random.default_rng(0)
    long = generator.normal(0, [5, 0.1], (200, 2))
    space = np.concatenate([long, long + np.array([0, 20]), [[8, 0], [0, 3]]]).astype(np.float32)
    found = TypeDistances.to_means(space, np.arange(400), np.repeat([0, 1], 200), 2, np.array([400, 401]))
    along, across = found.score()
    assert across > along  # 3 is far where the types are narrow, 8 is not where they are long
    alone = TypeDistances.to_means(space, np.array([0]), np.array([0]), 1, np.array([400]))
    assert np.isfinite(alone.score()).all()


def test_a_batch_is_far_by_what_held_out_cells_agree_on() -> None:
    assert not Batch(100, agreed=0.3, expected_agreed=0.4, beyond=0.1, shift=0.0).far
    assert Batch(100, agreed=0.3, expected_agreed=0.9, beyond=0.1, shift=0.0).far
    assert Batch(100, agreed=0.9, expected_agreed=float("nan"), beyond=0.6, shift=0.0).far
    assert not Batch(100, agreed=0.0, expected_agreed=float("nan"), beyond=0.1, shift=0.0).far


def test_a_type_of_few_cells_is_not_outvoted() -> None:
    generator = np.random.default_rng(0)
    rare, frequent = generator.normal(0, 0.1, (4, 2)), generator.normal([1.5, 0], 0.5, (200, 2))
    space = np.concatenate([rare, frequent, [[0, 0]]]).astype(np.float32)
    votes = neighbor_vote(space, np.arange(204), np.repeat([0, 1], [4, 200]), 2, np.array([204]))
    assert votes[0, 0] > 0.8


def test_the_shift_of_a_batch_is_limited_unless_random_cells_are_held_out() -> None:
    generator = np.random.default_rng(0)
    space = np.concatenate([generator.normal(0, 1, (600, 5)), generator.normal(3, 1, (300, 5))]).astype(np.float32)
    space[:, 0] += np.tile([0, 20, 40], 300)  # three types; the query is far from all of them
    codes = np.tile(np.arange(3), 200)
    rows = np.arange(600)
    certain = {"space": np.eye(3, dtype=np.float32)[codes[400:]]}
    part = HeldOutCells(rows[:400], codes[:400], rows[400:], codes[400:], certain, lambda code: certain)
    unknown = {}
    for limited in (True, False):
        rule = set_rule({"space": space}, [part], rows, codes, 3, 0, limited=limited)
        scores, batches = apply_rule(
            rule, {"space": space}, rows, codes, 3, np.arange(600, 900), np.full(300, "a", object), np.ones(300, bool)
        )
        unknown[limited] = float((scores > rule.threshold).mean())
        assert (batches["a"].shift > 1) == (not limited)
    assert unknown[True] > 0.9
    assert unknown[False] < 0.2


@given(st.integers(0, 2**16), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_the_most_variable_genes_are_those_of_scanpy(seed: int, n_batches: int) -> None:
    generator = np.random.default_rng(seed)
    rate = generator.gamma(0.5, 1, 300) * generator.lognormal(0, 0.5, (400, 300))
    counts = sp.csr_matrix(generator.poisson(rate).astype(np.float32))
    batch = generator.integers(0, n_batches, 400).astype(str).astype(object)
    table = ad.AnnData(counts, obs=pd.DataFrame({"batch": pd.Categorical(batch)}, index=np.arange(400).astype(str)))
    detected = counts.getnnz(axis=0) >= 3
    table = table[:, detected].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sc.pp.highly_variable_genes(
            table, flavor="seurat_v3", n_top_genes=50, batch_key="batch", inplace=False
        )
    found = variable_genes(counts, batch, 50)
    theirs = np.flatnonzero(detected)[expected["highly_variable"].to_numpy()]
    assert len(set(found) & set(theirs)) >= 47  # the rest have the same rank or score as others
    assert variable_genes(counts, batch, 1_000).tolist() == np.flatnonzero(counts.getnnz(axis=0)).tolist()


def test_folds_hold_out_whole_studies() -> None:
    codes = np.tile([0, 1, 2], 40)
    study = np.repeat(["a", "b", "c", "d"], 30).astype(object)
    folds, by = held_out_folds(codes, {"dataset_id": study}, 0)
    assert by == "dataset_id"
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(120))
    for fold in folds:
        assert not set(study[fold.test]) & set(study[fold.train])
    assert held_out_folds(np.array([0, 1]), {}, 0)[0] == []


def test_the_benchmark_reads_the_layout_of_open_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells, labels = simulated(300)
    obs = pd.DataFrame({"label": labels, "batch": cells.batch.astype(str)}, index=[f"cell{n}" for n in range(300)])
    whole = ad.AnnData(obs=obs, var=pd.DataFrame(index=cells.genes), layers={"counts": cells.counts}, shape=(300, 120))
    train, solution = whole[:200].copy(), whole[200:].copy()
    test = solution.copy()
    del test.obs["label"]
    for name, part in {"train": train, "test": test, "solution": solution[::-1].copy()}.items():
        part.write_h5ad(tmp_path / f"{name}.h5ad")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    arguments = ["annotation.py", "--open-problems", str(tmp_path), "--methods", "fast", "pca"]
    monkeypatch.setattr("sys.argv", arguments)
    importlib.import_module("annotation").main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| fast", "| pca"))]
    assert [row[0] for row in rows] == ["| fast", "| pca"]
    assert all(float(row[1]) > 0.9 for row in rows)


def test_the_benchmark_adds_what_its_table_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("annotation")
    cells, labels = simulated(300)
    table = ad.AnnData(cells.counts, var=pd.DataFrame(index=cells.genes))
    data = benchmark.Data(table, labels, cells.batch, np.arange(200), np.arange(200, 300), 10)
    monkeypatch.setattr(benchmark, "load", lambda *_: data)
    results = tmp_path / "results.csv"

    def run(*methods: str) -> list[str]:
        arguments = ["--data", "-", "--results", str(results), "--tasks", "simulated", "--seeds", "0"]
        parts = ["--parts", "accuracy", "--methods", *methods]
        monkeypatch.setattr("sys.argv", ["annotation.py", *arguments, *parts])
        benchmark.main()
        return capsys.readouterr().out.splitlines()

    run("pca")
    first = pd.read_csv(results)
    assert list(first["method"]) == ["pca", "permuted labels"]
    lines = run("pca", "logistic_regression")
    second = pd.read_csv(results)
    assert list(second["method"]) == ["pca", "permuted labels", "logistic_regression"]
    pd.testing.assert_frame_equal(second.iloc[:2].dropna(axis=1), first.dropna(axis=1), check_dtype=False)
    assert "simulated: accuracy, mean of 1 seed" in lines
    assert second["accuracy"][0] > 0.9 > 0.6 > second["accuracy"][1]
    names = [row["type"] for row in benchmark.excluded(data, "fast", 0, 0.6, done=["B cell"])]
    assert names == [name for name in benchmark.excluded_types(data, frequent=True) if name != "B cell"]


def test_the_query_is_the_reference() -> None:
    cells, labels = simulated(600)
    both = Cells(cells.counts[np.tile(np.arange(400), 2)], np.tile(cells.batch[:400], 2), 400, cells.genes)
    found = fast(both, np.tile(labels[:400], 2))
    assert (found.labels == labels[:400]).all()
    assert (~found.unknown).mean() > 0.9
