"""Counts that a model generates, compared with measured ones: the definitions, and that a trained model is better."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from pipeline import Run

from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.model.safe import load_safe
from census_scvi.publication import predictive_checks
from census_scvi.publication.predictive_checks import check_predictions


def test_a_trained_model_is_better_than_random_weights(finished_run: Run, demo_census: str, tmp_path: Path) -> None:
    run = Run(tmp_path, demo_census)
    shutil.copytree(finished_run.directory, run.directory)
    assert run("train", "train.max_epochs=60", "--force") == 0
    path = run.path("anndata_model.h5ad")
    data = PreparedDataModule(path, batch_size=128, train_size=0.9, seed=0, workers=1)
    model, description = load_safe(run.path("scvi.model"))
    before = torch.get_rng_state()
    found = check_predictions(model, description, data, 150, "cell_type", seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert check_predictions(model, description, data, 150, "cell_type", seed=0) == found
    assert found["cells"] == {"training": 150, "validation": min(150, data.n_val)}
    types = found["differential_expression"]
    assert len(types) > 1 and all(each["cells"] >= 10 for each in types)
    assert [each["cells"] for each in types] == sorted((each["cells"] for each in types), reverse=True)
    for weights in model.module.parameters():
        torch.nn.init.normal_(weights, std=0.1)
    worse = check_predictions(model, description, data, 150, "cell_type", seed=0)
    assert found["gene_variation"]["spearman"] > worse["gene_variation"]["spearman"] + 0.2
    f1 = [np.mean([each["gene_f1"] for each in result["differential_expression"]]) for result in (found, worse)]
    assert f1[0] > f1[1]
    assert check_predictions(model, description, data, 20, "no such column", seed=0)["differential_expression"] == []
    every = PreparedDataModule(data.cells.path, batch_size=128, train_size=1.0, seed=0, workers=1)
    alone = check_predictions(model, description, every, 20, "cell_type", seed=0)
    assert (alone["cells"], list(alone["cell_variation"])) == ({"training": 20, "validation": 0}, ["training"])


def test_the_metrics_are_those_of_their_definitions() -> None:
    numbers = np.random.default_rng(0)
    types = np.repeat(np.array(["a", "b", "rare"], dtype=object), [60, 40, 5])
    rates = np.where(np.arange(105)[:, None] % 3 == 0, 4.0, 1.0) * np.ones((105, 200))
    rates[:60, :20] *= 5
    measured = sp.csr_matrix(numbers.poisson(rates).astype(np.float32))
    dense = measured.toarray().astype(float)
    found = predictive_checks._variation(measured.sum(axis=1), measured.power(2).sum(axis=1), 200)
    np.testing.assert_allclose(found, dense.std(axis=1) / dense.mean(axis=1))
    assert predictive_checks._variation([0.0], [0.0], 5) == [0.0]
    constant = predictive_checks._agreement(np.ones(5), np.arange(5.0))
    assert constant == {"mean_absolute_error": 1.4, "pearson": None, "spearman": None}
    same = predictive_checks._differential_expression(measured, measured, types)
    assert [(each["type"], each["cells"], each["gene_f1"]) for each in same] == [("a", 60, 1.0), ("b", 40, 1.0)]
    assert all(each["lfc_pearson"] > 0.999 and each["lfc_mean_absolute_error"] == 0 for each in same)
    again = sp.csr_matrix(numbers.poisson(rates).astype(np.float32))
    (first, _) = predictive_checks._differential_expression(measured, again, types)
    assert first["gene_f1"] > 0.9  # the 20 genes of this type, of 200
    shuffled = again[np.append(numbers.permutation(100), np.arange(100, 105))]
    assert predictive_checks._differential_expression(measured, shuffled, types)[0]["gene_f1"] < 0.5


def test_the_card_has_them_unless_they_are_not_wanted(finished_run: Run, demo_census: str, tmp_path: Path) -> None:
    shutil.copytree(demo_census, tmp_path / "census")
    run = Run(tmp_path, str(tmp_path / "census"), gates={"sample_size": 40})
    shutil.copytree(finished_run.directory, run.directory)
    assert run("publish", "publish.predictive_cells=100") == 0
    record, card = (run.path(f"published/{name}").read_text() for name in ("provenance.json", "README.md"))
    found = json.loads(record)["predictions"]
    assert f"| genes | {found['gene_variation']['mean_absolute_error']:.3f} |" in card
    assert all(f"| {each['type']} | {each['cells']} |" in card for each in found["differential_expression"])
    assert "\n\n\n" not in card
    assert run("publish", "publish.predictive_cells=0", "publish.name=other", "--force") == 0
    assert "predictions" not in json.loads(run.path("published/provenance.json").read_text())
    card = run.path("published/README.md").read_text()
    assert "Posterior predictive" not in card and "\n\n\n" not in card
