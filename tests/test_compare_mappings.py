"""Ways to map a query: each is what it says, and the words follow from the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from test_surgery import generated, trained_reference

from census_scvi import Atlas
from census_scvi.model.encode import Encoder
from census_scvi.model.safe import load_safe
from census_scvi.query.surgery.adapt import Reference, plan_surgery
from census_scvi.query.surgery.compare import Comparison, compare_ways
from census_scvi.query.surgery.pace import plans_of_comparison, steps_per_epoch
from census_scvi.query.surgery.settings import JOINT, SurgeryTraining
from census_scvi.query.surgery.verdict import (
    BACKWARD,
    EQUAL_EPOCHS,
    EQUAL_STEPS,
    FORWARD,
    NO_SURGERY,
    seed_name,
    verdict,
)

TRAINING = {"max_epochs": 4, "batch_size": 32, "lr": 1e-2}


@pytest.fixture(scope="module")
def reference_cells() -> ad.AnnData:
    return generated({"first": 120, "second": 120}, seed=1)


@pytest.fixture(scope="module")
def query() -> ad.AnnData:
    return generated({"z-sample": 96, "a-sample": 64}, seed=2)


@pytest.fixture(scope="module")
def reference(reference_cells: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_reference(tmp_path_factory.mktemp("reference") / "model", reference_cells)


@pytest.fixture(scope="module")
def compared(reference: Path, query: ad.AnnData) -> Comparison:
    return Atlas.open(reference).compare_mappings(query, "batch", training=TRAINING)


def test_each_way_is_what_it_says(compared: Comparison, reference: Path, query: ad.AnnData) -> None:
    ways = {way.name: way for way in compared.ways}
    names = [JOINT, seed_name(1), seed_name(2), EQUAL_EPOCHS, EQUAL_STEPS, FORWARD, BACKWARD, NO_SURGERY]
    assert list(ways) == compared.table.index.tolist() == names
    atlas = Atlas.open(reference)
    for name, mode, more in (
        (JOINT, "joint", {}),
        (seed_name(2), "joint", {"seed": 2}),
        (EQUAL_EPOCHS, "per_batch", {}),
        (BACKWARD, "sequential", {"training": TRAINING | {"order": ["a-sample", "z-sample"]}}),
    ):
        adapted = atlas.adapt(query, "batch", mode=mode, **{"training": TRAINING, **more})
        np.testing.assert_allclose(ways[name].latent, adapted.embed(query).obsm["X_scvi"], atol=1e-6, err_msg=name)
    np.testing.assert_allclose(ways[NO_SURGERY].latent, atlas.embed(query).obsm["X_scvi"], atol=1e-6)
    assert [ways[name].steps for name in (JOINT, EQUAL_EPOCHS, EQUAL_STEPS, NO_SURGERY)] == [20, 20, 41, 0]
    assert ways[EQUAL_STEPS].epochs == [7, 10]  # 3 and 2 minibatches per epoch
    assert max(way.batch_by_batch for way in compared.ways) <= 1e-6
    assert (compared.table["moved"] == 0).all()


def test_the_plan_of_a_comparison_has_its_steps(compared: Comparison, reference: Path, query: ad.AnnData) -> None:
    found, labels = Reference(*load_safe(reference)), list(query.obs["batch"])
    joint, _ = plan_surgery(found, labels, JOINT, SurgeryTraining.of(JOINT, TRAINING))
    sizes = query.obs["batch"].value_counts()
    steps = []
    for plan in plans_of_comparison(found, labels, joint):
        trainings = [(plan.training_of(group), sizes[group].sum()) for group in plan.groups()]
        steps.append(sum(each.max_epochs * steps_per_epoch(n_cells, each) for each, n_cells in trainings))
    assert sorted(steps) == sorted(way.steps for way in compared.ways if way.name != NO_SURGERY)


def test_the_table(compared: Comparison, reference_cells: ad.AnnData, query: ad.AnnData, reference: Path) -> None:
    model, description = load_safe(reference)
    codes = pd.Index(description.batches).get_indexer(reference_cells.obs["batch"])
    latent = Encoder(model)(sp.csr_matrix(reference_cells.X), codes).mean
    labels, truth = (cells.obs["cell_type"].to_numpy(dtype=object) for cells in (reference_cells, query))
    found = compare_ways(compared.ways, latent, labels, truth)
    joint, seeds = found.table.loc[JOINT], found.table.loc[seed_name(1)]
    assert (joint["distance_largest"], joint["neighbor_overlap"], joint["cluster_agreement"]) == (0, 1, 1)
    assert joint[[name for name in found.table if name.startswith("agreement_")]].eq(1).all()
    shift = np.linalg.norm(compared.ways[0].latent - compared.ways[1].latent, axis=1)
    assert seeds["distance_mean"] == pytest.approx(shift.mean(), rel=1e-5)
    assert 0 < seeds["neighbor_overlap"] < 1
    for classifier in ("neighbors", "random_forest", "mlp"):
        assert found.table[f"accuracy_{classifier}"].between(0, 1).all()
    assert found.table["mixing"].between(0, 2).all()
    gain = found.table["accuracy_neighbors"] - joint["accuracy_neighbors"]
    np.testing.assert_allclose(found.table["gain_neighbors"], gain, atol=1e-12)
    assert found.table.loc[JOINT, "gain_error_neighbors"] == 0
    assert found.findings == verdict(found.table)
    assert found.recommendation.startswith(("Train all batches jointly", "Use “", "Map without surgery"))


CLASSIFIERS = ("neighbors", "random_forest", "mlp")


def table(ways: tuple[str, ...] = (EQUAL_EPOCHS, EQUAL_STEPS, FORWARD, BACKWARD), **changes: Any) -> pd.DataFrame:
    """A table in which every way is as far from joint, and as accurate, as another seed, but some."""
    names = [JOINT, seed_name(1), seed_name(2), *ways, NO_SURGERY]
    same = {"distance_mean": 0.1, "neighbor_overlap": 0.9, "moved": 0.0, "batch_by_batch": 1e-7, "mixing": 0.8}
    for classifier in CLASSIFIERS:
        same |= {f"accuracy_{classifier}": 0.8, f"gain_error_{classifier}": 0.01}
    rows = pd.DataFrame(same, names)
    short = {"steps": EQUAL_STEPS, "epochs": EQUAL_EPOCHS, "forward": FORWARD, "none": NO_SURGERY, "seed": seed_name(1)}
    for name, values in changes.items():
        for column, value in values.items():
            rows.loc[short[name], column] = value
    return rows


def more_accurate(by: float, classifiers: tuple[str, ...] = CLASSIFIERS) -> dict[str, float]:
    return {f"accuracy_{classifier}": 0.8 + by for classifier in classifiers}


def without_labels(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop(columns=[name for name in rows if name.startswith(("accuracy", "gain"))])


FAR = {"distance_mean": 0.3}


def test_the_words_follow_from_the_numbers() -> None:
    alike = verdict(table())
    assert alike[0] == (
        "Train all batches jointly: no difference beyond seeds between the ways of training, and this is one training."
        " For labels, surgery is not needed: without it they are not less accurate beyond seeds."
    )
    for name in (EQUAL_EPOCHS, FORWARD, BACKWARD):
        assert f"“{name}”: no difference beyond seeds." in " ".join(alike)
    same = "no difference beyond seeds in the accuracy of labels: 0.800 against 0.800 (neighbors), 0.800 against 0.800"
    assert f"“{NO_SURGERY}”: {same} (random forest), 0.800 against 0.800 (perceptron)." in alike
    assert alike[-1] == (
        "The reference did not move (no change of its latent), and it does not matter whether cells are embedded"
        " together or batch by batch (largest change 1e-07)."
    )
    only_steps = verdict(table(steps=FAR))
    assert only_steps[0].startswith("Train all batches jointly: the labels of no other way of training are more")
    assert f"“{EQUAL_STEPS}”: 3.0 times the distance between seeds. Mean distance 0.3" in " ".join(only_steps)
    assert "the number of steps matters, not the grouping" in " ".join(only_steps)
    assert "the grouping" not in " ".join(verdict(table(steps=FAR, epochs=FAR)))
    assert verdict(table(ways=()))[0].startswith("Train all batches jointly: for this query and model it is the only")


def test_accuracy_counts_beyond_error_and_seeds() -> None:
    better = verdict(table(forward=more_accurate(0.05)))
    assert better[0] == (
        f"Use “{FORWARD}”: its labels are more accurate than those of all joint trainings, by more than seeds differ."
    )
    for noise in (
        {"forward": more_accurate(0.015)},  # within two standard errors
        {"forward": more_accurate(0.05), "seed": more_accurate(-0.06)},  # seeds differ more
        {"forward": more_accurate(0.05), "seed": more_accurate(0.03)},  # less far from the best seed than seeds differ
        {"forward": more_accurate(0.05, ("mlp",))},  # one classifier of three
        {"forward": more_accurate(0.05) | more_accurate(-0.05, ("mlp",))},  # classifiers disagree
    ):
        assert verdict(table(**noise))[0].startswith("Train all batches jointly")
    without = table(none=more_accurate(0.09), forward=more_accurate(0.05))
    assert verdict(without)[0].startswith("Map without surgery: its labels are more accurate")
    worse = verdict(table(none=more_accurate(-0.05), seed=more_accurate(0.01)))
    assert worse[0].endswith("Without surgery the labels are less accurate.")
    less = "“no surgery”: labels are less accurate than after joint training: 0.750 against 0.800 to 0.810 (neighbors)"
    assert less in " ".join(worse)


def test_without_known_labels_no_way_is_called_better() -> None:
    assert "none can be called better" in verdict(without_labels(table(epochs=FAR)))[0]
    assert verdict(without_labels(table()))[0].endswith("and this is one training.")


@pytest.mark.parametrize("n_seeds", [2, 3])
@settings(max_examples=60)
@given(numbers=st.lists(st.floats(0.5, 1.0), min_size=3, max_size=3), order=st.permutations(range(3)))
def test_a_way_like_a_seed_is_never_better(n_seeds: int, numbers: list[float], order: list[int]) -> None:
    """Whatever the accuracies of joint trainings are, one of them under another name is no difference."""
    rows = table().drop(index=[] if n_seeds == 3 else [seed_name(2)])
    joint = [JOINT, seed_name(1), seed_name(2)][:n_seeds]
    for classifier in CLASSIFIERS:
        rows[f"accuracy_{classifier}"] = numbers[0]
        for name, number in zip(joint, order, strict=False):
            rows.loc[name, f"accuracy_{classifier}"] = numbers[number]
        rows.loc[FORWARD, f"accuracy_{classifier}"] = rows.loc[joint[-1], f"accuracy_{classifier}"]
    assert f"“{FORWARD}”" not in verdict(rows)[0]


def test_a_query_of_one_batch_is_trained_once_per_seed(reference: Path) -> None:
    cells = generated({"alone": 40}, seed=3)
    compared = Atlas.open(reference).compare_mappings(cells, "batch", training=TRAINING | {"max_epochs": 1})
    assert [way.name for way in compared.ways] == [JOINT, seed_name(1), seed_name(2), NO_SURGERY]
    assert compared.recommendation == "Train all batches jointly: for this query and model it is the only way."


def test_a_reference_on_which_surgery_has_no_effect(
    reference_cells: ad.AnnData, query: ad.AnnData, tmp_path: Path
) -> None:
    model = trained_reference(tmp_path / "model", reference_cells, encode_covariates=False)
    compared = Atlas.open(model).compare_mappings(query, "batch", training=TRAINING)
    assert [way.name for way in compared.ways] == [NO_SURGERY]
    assert compared.recommendation == "Surgery cannot change the embedding of this query: map it without surgery."
