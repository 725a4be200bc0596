"""Ways to map a query: each is what it says, and the words follow from the numbers."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from test_surgery import generated, trained_reference

from census_scvi import Atlas
from census_scvi.model.encode import Encoder
from census_scvi.model.safe import load_safe
from census_scvi.query.surgery.compare import (
    BACKWARD,
    EQUAL_EPOCHS,
    EQUAL_STEPS,
    FORWARD,
    NO_SURGERY,
    OTHER_SEED,
    Comparison,
    compare_ways,
    recommendation,
)
from census_scvi.query.surgery.settings import JOINT

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
    names = [JOINT, OTHER_SEED, EQUAL_EPOCHS, EQUAL_STEPS, FORWARD, BACKWARD, NO_SURGERY]
    assert list(ways) == compared.table.index.tolist() == names
    atlas = Atlas.open(reference)
    for name, mode, more in (
        (JOINT, "joint", {}),
        (OTHER_SEED, "joint", {"seed": 1}),
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


def test_the_table(compared: Comparison, reference_cells: ad.AnnData, query: ad.AnnData, reference: Path) -> None:
    model, description = load_safe(reference)
    codes = pd.Index(description.batches).get_indexer(reference_cells.obs["batch"])
    latent = Encoder(model)(sp.csr_matrix(reference_cells.X), codes).mean
    labels, truth = (cells.obs["cell_type"].to_numpy(dtype=object) for cells in (reference_cells, query))
    found = compare_ways(compared.ways, latent, labels, truth)
    joint, seeds = found.table.loc[JOINT], found.table.loc[OTHER_SEED]
    assert (joint["distance_largest"], joint["neighbor_overlap"], joint["cluster_agreement"]) == (0, 1, 1)
    assert joint[[name for name in found.table if name.startswith("agreement_")]].eq(1).all()
    shift = np.linalg.norm(compared.ways[0].latent - compared.ways[1].latent, axis=1)
    assert seeds["distance_mean"] == pytest.approx(shift.mean(), rel=1e-5)
    assert 0 < seeds["neighbor_overlap"] < 1
    for classifier in ("neighbors", "random_forest", "mlp"):
        assert found.table[f"accuracy_{classifier}"].between(0, 1).all()
    assert found.table["mixing"].between(0, 2).all()
    assert found.recommendation.startswith(
        ("no difference beyond seeds: two seeds of joint", "beyond seeds (two seeds")
    )
    assert "accuracy by nearest neighbors" in found.recommendation


def table(**distance: float) -> pd.DataFrame:
    """A table in which every way is as far from joint as another seed, but some."""
    names = [JOINT, OTHER_SEED, EQUAL_EPOCHS, EQUAL_STEPS, FORWARD, BACKWARD, NO_SURGERY]
    rows = pd.DataFrame({"distance_mean": 0.1, "agreement_neighbors": 0.95, "accuracy_neighbors": 0.8}, names)
    for name, value in distance.items():
        rows.loc[{"steps": EQUAL_STEPS, "epochs": EQUAL_EPOCHS, "forward": FORWARD}[name], "distance_mean"] = value
    return rows


def test_the_words_follow_from_the_numbers() -> None:
    assert "no difference beyond seeds: two seeds of joint are 0.1 apart on average" in recommendation(table())
    assert "surgery changes little (accuracy by nearest neighbors 0.800 with joint" in recommendation(table())
    only_steps = recommendation(table(steps=0.3))
    assert "these differ from joint: per batch, equal steps (distance ratio 3.0)" in only_steps
    assert "the length of the training matters" in only_steps
    assert "length of the training" not in recommendation(table(steps=0.3, epochs=0.3))
    labels = table()
    labels.loc[FORWARD, "agreement_neighbors"] = 0.9
    labels.loc[NO_SURGERY, "accuracy_neighbors"] = 0.6
    words = recommendation(labels)
    assert "these differ from joint: sequential (distance ratio 1.0)" in words
    assert "surgery helps (accuracy by nearest neighbors 0.800 with joint surgery, 0.600 without): use joint" in words
    labels.loc[NO_SURGERY, "accuracy_neighbors"] = 0.9
    assert "surgery does harm" in recommendation(labels)


def test_a_reference_on_which_surgery_has_no_effect(
    reference_cells: ad.AnnData, query: ad.AnnData, tmp_path: Path
) -> None:
    model = trained_reference(tmp_path / "model", reference_cells, encode_covariates=False)
    compared = Atlas.open(model).compare_mappings(query, "batch", training=TRAINING)
    assert [way.name for way in compared.ways] == [NO_SURGERY]
    assert compared.recommendation == "surgery cannot change the embedding of this query: map it without surgery"
