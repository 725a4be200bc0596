"""Every stage and every reader in folders whose names a URL, TileDB, fsspec or a shell would take for more."""

import json
import shutil
from pathlib import Path

import pytest
import tiledbsoma
from pipeline import Run

import census_scvi
from census_scvi.census.embedding import published_uri
from census_scvi.cli import main

NASTY = "a b%20%#c?d&e+é'\"[x]{y};z:1=\\n"


def test_all_stages_in_a_folder_of_any_name(
    demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / NASTY
    census, model = folder / "census#1", folder / "pub?1#2"
    shutil.copytree(demo_census, census)
    run = Run(folder, str(census), gates={"sample_size": 100}, publish={"model_uri": str(model)}).all()
    assert run("publish") == 0
    experiment = f"{census}/census_data/homo_sapiens"
    first = published_uri(experiment, "scvi")
    assert run("publish", "publish.replace=true", "--force") == 0
    assert first and published_uri(experiment, "scvi") not in (None, first)
    with tiledbsoma.open(experiment) as opened:
        measurement = opened.ms["RNA"]
        for array in (measurement["obsm"]["scvi"], measurement["scvi_summary"]):  # a damaged byte is noticed
            options = array.schema_config_options()
            columns = [*json.loads(options.dims).values(), *json.loads(options.attrs).values()]
            assert all("CHECKSUM_SHA256" in str(column["filters"]) for column in columns)
    for published in (str(model), f"file://{model}", model.as_uri(), str(run.path("published"))):
        assert main("verify", [published, "--census", str(census), "--sample", "50"]) == 0, capsys.readouterr()
        assert census_scvi.load_model(published).is_trained
    with census_scvi.Atlas.open(str(model), census=census.as_uri()) as atlas:
        latent = atlas.embeddings("is_primary_data == True", max_cells=50).obsm["scvi"]
    assert latent.shape == (50, 4)
    assert {path.name for path in tmp_path.iterdir()} == {NASTY}
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "run", census.name, model.name}
