"""The notebooks run from the first cell to the last, and are kept with what they put out."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from pipeline import ROOT, ForkedKernel, Run

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def project(finished_run: Run, demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with notebooks beside what `make demo` leaves, smaller."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(demo_census, folder / "demo" / "census")
    run = Run(folder / "demo", str(folder / "demo" / "census"), gates={"sample_size": 300})
    shutil.copytree(finished_run.directory, run.directory)
    assert run("publish") == 0
    (folder / "notebooks").mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", ForkedKernel)
    copy = Path(shutil.copy(notebook, project / "notebooks"))
    importlib.import_module("execute").execute(copy)
    assert str(project) not in copy.read_text()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_put_out_is_kept(notebook: Path) -> None:
    """Read on the web, it is worth nothing without; and it was run from top to bottom, without an error."""
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"execute_result", "display_data", "stream"}
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert outputs
    if "atlas.umap(" in "".join(cell.source for cell in cells):
        assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(r"/(root|home|Users|work)/", notebook.read_text())
