"""`make demo` on a smaller Census: the table names what is there, and there is a picture."""

import shutil
from pathlib import Path

import matplotlib.image
import pytest
from pipeline import ROOT

from census_scvi.stages.demo import run_demo


@pytest.mark.slow
def test_the_demo_shows_what_it_made(
    demo_census: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    shutil.copytree(demo_census, tmp_path / "census")  # to publish into
    small = [
        f"census.uri={tmp_path / 'census'}",
        "census.obs_query_model='is_primary_data == True and nnz >= 50'",
        f"output.directory={tmp_path / 'run'}",
        "hvg.top_n_hvg=100",
        "train.max_epochs=2",
        "evaluate.measured_cells=300",
        "evaluate.batches=[dataset_id]",
    ]
    assert run_demo(small) == 0
    out = capsys.readouterr().out
    for line in [line for line in out.splitlines() if line.startswith(f"  {tmp_path}")]:
        assert Path(line.split()[0]).exists()
    assert "raw counts, 1,380 cells x 100 genes, 13 batches" in out
    assert "published is valid" in out
    assert "latent means, 1,500 cells x 20" in out
    assert (tmp_path / "run" / "evaluation" / "report.html").stat().st_size > 100_000
    picture = matplotlib.image.imread(tmp_path / "demo-umap.png")
    assert picture.shape[0] > 500
    assert picture.std() > 0.05  # something is drawn


def test_a_stage_that_fails_stops_the_demo(
    tmp_path: Path, demo_census: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert run_demo([f"census.uri={demo_census}", f"output.directory={tmp_path}", "anndata.batch_key=[nothing]"]) == 2
    error = capsys.readouterr().err
    assert "contains 'nothing'" in error
    assert "the demo stopped in prepare" in error
