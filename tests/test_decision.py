"""Keep, fine-tune or train again: what is measured, on cells that nothing was trained on, and what follows from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scvi
from hypothesis import given
from hypothesis import strategies as st
from pipeline import Run

from census_scvi.census.cell_keys import cell_keys
from census_scvi.census.cells import Cells
from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.errors import UserError
from census_scvi.fine_tuning.extrapolate import extrapolated
from census_scvi.fine_tuning.held_out import Group, held_out_keys
from census_scvi.fine_tuning.measure import costs, elbo
from census_scvi.fine_tuning.new_cells import NewCells
from census_scvi.fine_tuning.verdict import recommend
from census_scvi.local_census.demo.releases import write_demo_releases
from census_scvi.model.safe import load_safe

ROW = {"transfer": 0.8, "transfer_error": 0.005, "bio": 0.7, "batch": 0.5, "elbo_old": 500.0, "elbo_new": 600.0}
NAN = float("nan")


@given(a=st.floats(100, 1000), b=st.floats(10, 500), c=st.floats(0.3, 2), n=st.integers(10, 40), more=st.integers(1, 5))
def test_a_power_law_is_continued(a: float, b: float, c: float, n: int, more: int) -> None:
    curve = [a + b * epoch**-c for epoch in range(1, n + 1)]
    expected = a + b * (n * more) ** -c
    found = extrapolated(curve, n * more)
    assert found is not None
    assert abs(found - expected) <= 0.02 * b + 1e-6
    assert found <= curve[-1] + 1e-6


def test_a_curve_that_rises_is_expected_to_stay() -> None:
    assert extrapolated([5.0, 4.0, 4.1, 4.2, 4.3, 4.4, 4.5, 4.6], 100) == 4.6


def test_a_short_curve_is_not_continued() -> None:
    assert extrapolated([5.0, 4.0, 3.5, 3.2], 100) is None
    assert extrapolated([NAN, 5.0, NAN, 4.0, NAN, 3.5, NAN, 3.2], 100) is None


@pytest.mark.parametrize(
    ("changes", "recommended", "reason"),
    [
        ({}, "Keep the model as it is.", "no difference that counts"),
        ({"continue": {"transfer": 0.85}}, "Fine-tune with mode continue.", "better (label transfer 0.850, was 0.800)"),
        ({"continue": {"transfer": 0.809}}, "Keep the model as it is.", "no difference that counts"),
        (
            {"continue": {"transfer": 0.83, "transfer_error": 0.02}},
            "Keep the model as it is.",
            "no difference that counts",
        ),
        (
            {"continue": {"transfer": 0.85, "elbo_old": 520.0}},
            "Keep the model as it is.",
            "worse (ELBO of old cells 520.0, was 500.0) and better (label transfer 0.850, was 0.800)",
        ),
        (
            {"continue": {"bio": 0.73}, "retrain": {"bio": 0.74}},
            "Fine-tune with mode continue.",
            "instead of continue:",
        ),
        ({"continue": {"bio": 0.73}, "retrain": {"bio": 0.76}}, "Train the model again.", "biology 0.760, was 0.730"),
        ({"retrain": {"batch": 0.6, "bio": 0.6}}, "Keep the model as it is.", "worse (biology 0.600, was 0.700)"),
        ({"new_batches": {"batch": 0.6}}, "Fine-tune with mode new_batches.", "batch mixing 0.600, was 0.500"),
    ],
)
def test_the_recommendation_follows_from_the_rows(changes: dict[str, Any], recommended: str, reason: str) -> None:
    rows = {way: {**ROW, **changes.get(way, {})} for way in ("keep", "new_batches", "continue", "retrain")}
    first, *others = recommend(rows)
    assert first == recommended
    assert reason in " ".join(others)


def test_without_labels_the_elbo_of_new_cells_counts() -> None:
    unknown = {**ROW, "transfer": NAN, "transfer_error": NAN, "bio": NAN, "batch": NAN}
    rows = {"keep": unknown, "continue": {**unknown, "elbo_new": 590.0}}
    assert recommend(rows)[0] == "Fine-tune with mode continue."
    assert recommend({**rows, "continue": {**unknown, "elbo_new": 595.0}})[0] == "Keep the model as it is."


def test_costs() -> None:
    assert costs(1800, 3600, 4.0) == {"train_hours": 0.5, "embed_hours": 1.0, "hours": 1.5, "price": 6.0}
    assert "price" not in costs(1800, 3600, None)


def test_the_elbo_is_that_of_scvi_tools(finished_run: Run) -> None:
    model, description = load_safe(finished_run.path("scvi.model"))
    cells = ad.read_h5ad(finished_run.path("anndata_model.h5ad"))
    theirs = scvi.model.SCVI.load(str(finished_run.path("scvi.model")), adata=cells)
    codes = cells.obs["batch"].cat.codes.to_numpy(np.int64)
    labels = np.full(cells.n_obs, None, dtype=object)
    group = Group(cells.obs, cells.X, labels, cells.obs["batch"].to_numpy(dtype=object))
    assert description.batches == list(cells.obs["batch"].cat.categories)
    expected = -float(theirs.get_elbo())  # scvi-tools 1.4 gives the evidence lower bound itself
    assert elbo(model, group, codes, 0) == pytest.approx(abs(expected), rel=2e-3)


def test_the_old_held_out_cells_are_those_that_the_model_was_validated_on(finished_run: Run, tmp_path: Path) -> None:
    path = finished_run.path("anndata_model.h5ad")
    keys = cell_keys(ad.read_h5ad(path).obs)
    data = PreparedDataModule(path, batch_size=8, train_size=0.9, seed=0, workers=0)
    every = np.append(keys, np.arange(200, dtype=np.uint64))
    new = np.append(np.zeros(len(keys), bool), np.ones(200, bool))
    cells = Cells(np.arange(len(every)), np.zeros(len(every), np.int32), ["batch"])
    found = NewCells(cells, every, new, 1, len(keys), 0)
    held, source = held_out_keys(found, str(finished_run.directory), 0)
    assert source == "validation cells of the model's training"
    assert set(held) & set(keys) == set(keys[data.validation])
    assert len(set(held) - set(keys)) == 20
    held, source = held_out_keys(found, str(finished_run.path("scvi.model").parent), 1)
    assert set(held) & set(keys) == set(keys[data.validation])  # the seed is that of the training
    shutil.copytree(finished_run.directory, tmp_path / "run")
    manifest = finished_run.manifest()
    manifest["stages"]["train"]["config"]["train"]["split_seed"] = 5
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    other = PreparedDataModule(path, batch_size=8, train_size=0.9, seed=0, split_seed=5, workers=0)
    assert set(held_out_keys(found, str(tmp_path / "run"), 0)[0]) & set(keys) == set(keys[other.validation])
    few = NewCells(cells, every, np.arange(len(every)) == 0, 1, len(keys), 0)
    with pytest.raises(UserError, match=r"0 new cells and .* can be held out, and 10 of each are needed to decide"):
        held_out_keys(few, str(finished_run.directory), 0)


@pytest.mark.slow
def test_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All ways are trained without the held-out cells; a second decision trains nothing again."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    write_demo_releases(first, second, scale=0.2, n_genes=300)
    base = Run(tmp_path / "base", first)
    assert base("prepare") == base("train") == 0
    run = Run(
        tmp_path / "next",
        second,
        fine_tune={"model": str(base.directory), "replay_cells": 50, "max_epochs": 2, "budget": 0.5},
        train={"max_epochs": 12},
        evaluate={"batches": [], "labels": ["cell_type"]},
        cost={"per_hour": 3600.0},
    )
    assert run("fine-tune", "--decide") == 0
    shown = capsys.readouterr().out
    folder = run.path("decision")
    record = json.loads((folder / "decision.json").read_text())
    rows = record["rows"]
    assert list(rows) == ["keep", "new_batches", "continue", "retrain"]
    assert [row["epochs"] for row in rows.values()] == [0, 0, 2, 6]
    same = ("elbo_new", "elbo_old", "transfer", "bio")
    assert [rows["keep"][name] for name in same] == [rows["new_batches"][name] for name in same]  # a blind encoder
    assert rows["keep"]["moved"] == 0 < rows["continue"]["moved"]
    assert rows["retrain"]["moved"] is None
    assert rows["retrain"]["price"] == pytest.approx(3600 * rows["retrain"]["hours"])
    whole = rows["retrain"]["train_hours"] / 0.5 + rows["retrain"]["embed_hours"]
    assert rows["retrain"]["elbo_new_extrapolated"] < rows["retrain"]["elbo_new"]
    assert rows["retrain"]["hours_extrapolated"] == pytest.approx(whole)
    assert record["recommendation"][0] in shown
    assert "held-out old cells" in (folder / "report.html").read_text()
    held = np.load(folder / "held-out.npy")
    sizes = []
    for way in ("new_batches", "continue", "retrain"):
        prepared = ad.read_h5ad(folder / way / "anndata_model.h5ad")
        assert not np.isin(cell_keys(prepared.obs), held).any()
        sizes.append(prepared.n_obs)
    assert sizes[0] + 50 == sizes[1] < sizes[2]
    records = [(folder / way / "manifest.json").read_text() for way in ("new_batches", "continue", "retrain")]
    assert run("fine-tune", "--decide") == 0
    assert records == [(folder / way / "manifest.json").read_text() for way in ("new_batches", "continue", "retrain")]
    again = json.loads((folder / "decision.json").read_text())["rows"]
    assert again["continue"]["elbo_new"] == rows["continue"]["elbo_new"]
