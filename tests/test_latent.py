"""The latent is the published model's, for every cell of the query, and equal to scvi-tools' own."""

import pickle
import shutil
from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
import scvi
import tiledbsoma
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline import Run
from test_prepare import expected

from census_scvi.census.genes import read_genes, write_genes
from census_scvi.errors import UserError
from census_scvi.model.build import build_model
from census_scvi.model.encode import Encoder, batch_labels, extend_batches, reference_latent
from census_scvi.model.latent_store import LatentStore
from census_scvi.model.safe import load_safe


def library_latent(run: Run, census: str) -> tuple[np.ndarray, np.ndarray, ad.AnnData]:
    """All cells the way scvi-tools' users do it."""
    model = str(run.path("scvi.model"))
    reference = scvi.model.SCVI.load(model, adata=ad.read_h5ad(run.path("anndata_model.h5ad")))
    cells = expected(census, "soma_joinid >= 0", reference.adata.var_names.tolist())
    keys = ["dataset_id", "assay", "suspension_type", "donor_id"]
    cells.obs["batch"] = cells.obs[keys].astype(str).agg("|".join, axis=1)
    query = scvi.model.SCVI.load_query_data(cells, model)
    query.is_trained = True
    mean, variance = query.get_latent_representation(return_dist=True)
    return mean, variance, query.adata


def test_the_latent_of_every_cell_equals_load_query_data(finished_run: Run, demo_census: str) -> None:
    mean, variance, cells = library_latent(finished_run, demo_census)
    latent = np.load(finished_run.path("latent.npy"))
    assert latent.dtype == np.float32
    np.testing.assert_allclose(latent, mean, atol=1e-5)
    joinids = np.load(finished_run.path("latent-idx.npy"))
    assert joinids.dtype == np.int64
    assert joinids.tolist() == cells.obs["soma_joinid"].tolist()
    minified = ad.read_h5ad(finished_run.path("final_scvi_optimized") / "adata.h5ad")
    np.testing.assert_allclose(minified.obsm["scvi_latent_qzv"], variance, atol=1e-5, rtol=1e-5)


def test_cells_of_equal_counts_are_known(finished_run: Run, demo_census: str) -> None:
    _, _, cells = library_latent(finished_run, demo_census)
    counts = cells.X.toarray()
    hashes = np.load(finished_run.path("latent-hash.npy"))
    assert hashes.dtype == np.uint64
    _, by_hash = np.unique(hashes, return_inverse=True)
    _, by_counts = np.unique(counts, axis=0, return_inverse=True)
    assert len(set(zip(by_hash.tolist(), by_counts.tolist(), strict=True))) == by_hash.max() + 1 == by_counts.max() + 1
    assert by_hash.max() + 1 < len(counts)  # the Census has copies


def test_with_encode_covariates_cells_of_trained_batches_equal_load_query_data(
    demo_census: str, tmp_path: Path
) -> None:
    run = Run(tmp_path, demo_census, model={"encode_covariates": True, "n_layers": 2}).all()
    mean, _, cells = library_latent(run, demo_census)
    trained = cells.obs["batch"].isin(run.record("create-latent-update")["trained_batches"]).to_numpy()
    assert 0 < trained.sum() < len(trained)
    latent = np.load(run.path("latent.npy"))
    np.testing.assert_allclose(latent[trained], mean[trained], atol=1e-5)
    assert np.isfinite(latent).all()


def test_copies_of_a_cell_have_its_latent(finished_run: Run, demo_census: str) -> None:
    """Non-primary copies are embedded as well, from the same counts to the same place."""
    with cellxgene_census.open_soma(uri=demo_census) as root:
        cells = cellxgene_census.get_anndata(root, "Homo sapiens")
    latent = np.load(finished_run.path("latent.npy"))
    places = {row.tobytes(): number for number, row in enumerate(cells.X.toarray())}
    copies = np.flatnonzero(~cells.obs["is_primary_data"].to_numpy())
    assert len(copies) > 50
    pairs = [(copy, places[cells.X[copy].toarray().ravel().tobytes()]) for copy in copies]
    np.testing.assert_allclose(latent[[c for c, _ in pairs]], latent[[p for _, p in pairs]], atol=1e-5)


def test_the_minified_model_loads_in_plain_scvi_tools(finished_run: Run) -> None:
    model = scvi.model.SCVI.load(str(finished_run.path("final_scvi_optimized")))
    assert model.minified_data_type == "latent_posterior_parameters"
    latent = np.load(finished_run.path("latent.npy"))
    assert np.array_equal(model.get_latent_representation(), latent)
    batch = finished_run.record("create-latent-update")["trained_batches"][0]
    expression = model.get_normalized_expression(indices=np.arange(5), transform_batch=batch)
    assert np.isfinite(expression.to_numpy()).all()
    assert set(model.adata.uns["trained_batches"]) == set(
        finished_run.record("create-latent-update")["trained_batches"]
    )
    assert model.adata.X.nnz == 0
    assert "cell_type" in model.adata.obs
    counts = ad.read_h5ad(finished_run.path("anndata_model.h5ad"))
    size = model.adata.obs.set_index("soma_joinid")["observed_lib_size"].loc[counts.obs["soma_joinid"]]
    np.testing.assert_allclose(size, np.asarray(counts.X.sum(axis=1)).ravel())


def test_means_and_variances_are_stored_once(finished_run: Run) -> None:
    minified = ad.read_h5ad(finished_run.path("final_scvi_optimized") / "adata.h5ad")
    assert sorted(minified.obsm) == ["scvi_latent_qzm", "scvi_latent_qzv"]


def test_weights_of_untrained_batches_are_the_same_in_every_run(finished_run: Run) -> None:
    model, description = load_safe(finished_run.path("scvi.model"))
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        extended = extend_batches(model, description.genes, ["new one", "another"])
        states.append(extended.module.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert batch_labels(extended) == [*description.batches, "another", "new one"]
    grown = [n for n, t in states[0].items() if t.shape != model.module.state_dict()[n].shape]
    assert grown
    for name in grown:
        old = model.module.state_dict()[name]
        assert torch.equal(states[0][name][:, : old.shape[1]], old)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.lists(st.integers(0, 60_000), min_size=3, max_size=3), min_size=1, max_size=6),
    minibatch=st.integers(1, 4),
)
def test_any_counts_in_any_minibatches_give_scvi_tools_posterior(
    finished_run: Run, counts: list[list[int]], minibatch: int
) -> None:
    model, description = load_safe(finished_run.path("scvi.model"))
    values = np.zeros((len(counts), len(description.genes)), dtype=np.float32)
    values[:, :3] = counts
    matrix = sp.csr_matrix(values)
    latent = Encoder(model)(matrix, np.zeros(len(counts), dtype=np.int32), minibatch=minibatch)
    mean, variance = reference_latent(model, description.genes, matrix, ["unseen"] * len(counts))
    np.testing.assert_allclose(latent.mean, mean, atol=1e-5)
    # Its logarithm rounds like the mean: the variance by as much of its size.
    np.testing.assert_allclose(latent.variance, variance, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(latent.library_size, values.sum(axis=1))


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize(("dropout_rate", "n_hidden", "n_cells"), [(0.0, 64, 0), (0.1, 64, 10**6), (0.1, 300, 10**6)])
def test_the_folded_encoder_is_scvi_tools_encoder(
    n_layers: int, dropout_rate: float, n_hidden: int, n_cells: int
) -> None:
    """Random weights and BatchNorm statistics; cells from empty to counts in the tens of thousands."""
    torch.manual_seed(n_layers)
    genes = [f"g{i}" for i in range(300)]
    arguments = {"n_layers": n_layers, "dropout_rate": dropout_rate, "n_hidden": n_hidden, "gene_likelihood": "nb"}
    model = build_model(genes, ["a", "b"], arguments)
    for layer in model.module.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            for tensor in (layer.running_mean, layer.bias.data):
                tensor.normal_()
            for tensor in (layer.running_var, layer.weight.data):
                tensor.uniform_(0.2, 3)
    model.is_trained_ = True
    generator = np.random.default_rng(0)
    counts = generator.poisson(generator.gamma(0.1, 20, size=(50, 300))).astype(np.float32)
    counts[0], counts[1] = 0, generator.integers(0, 50_000, 300)
    mean, variance = reference_latent(model, genes, sp.csr_matrix(counts), ["a"] * 50)
    encode = Encoder(model, n_cells=n_cells)
    assert encode._folded is not None
    assert encode._folded._compiled == (n_hidden == 300)
    latent = encode(sp.csr_matrix(counts), np.zeros(50, dtype=np.int32), minibatch=7)
    np.testing.assert_allclose(latent.mean, mean, atol=1e-5)
    np.testing.assert_allclose(latent.variance, variance, atol=1e-5, rtol=1e-5)


# --- settings


@pytest.mark.parametrize(("minified", "cells"), [("sample", 100), ("none", 0)])
def test_minified_and_block_size(
    finished_run: Run, demo_census: str, tmp_path: Path, minified: str, cells: int
) -> None:
    run = Run(tmp_path, demo_census, latent={"minified": minified, "sample_size": 100, "block_size": 77})
    shutil.copytree(finished_run.directory, run.directory)
    assert run("create-latent-update", "--force") == 0
    np.testing.assert_allclose(np.load(run.path("latent.npy")), np.load(finished_run.path("latent.npy")), atol=1e-5)
    outputs = run.record("create-latent-update")["outputs"]
    if not cells:
        assert not [name for name in outputs if name.startswith("final_scvi_optimized")]
        return
    model = scvi.model.SCVI.load(str(run.path("final_scvi_optimized")))
    assert model.adata.n_obs == cells
    joinids = np.load(run.path("latent-idx.npy"))
    rows = np.searchsorted(joinids, model.adata.obs["soma_joinid"])
    assert np.array_equal(model.get_latent_representation(), np.load(run.path("latent.npy"))[rows])


def test_obs_query_limits_the_cells(finished_run: Run, demo_census: str, tmp_path: Path) -> None:
    run = Run(tmp_path, demo_census)
    shutil.copytree(finished_run.directory, run.directory)
    assert run("create-latent-update", "--force", "census.obs_query='soma_joinid < 100'") == 0
    assert np.load(run.path("latent-idx.npy")).tolist() == list(range(100))


# --- genes travel by feature_id


def copy_census(census: str, target: Path) -> str:
    shutil.copytree(census, target)
    return str(target)


def rename_genes(uri: str, new_name: dict[int, str]) -> None:
    with tiledbsoma.open(f"{uri}/census_data/homo_sapiens/ms/RNA/var") as var:
        table = var.read().concat()
    names = [new_name.get(i, name) for i, name in enumerate(table["feature_id"].to_pylist())]
    column = table.schema.get_field_index("feature_id")
    field = table.schema.field(column)
    table = table.set_column(column, field, pa.array(names, type=field.type))
    with tiledbsoma.open(f"{uri}/census_data/homo_sapiens/ms/RNA/var", "w") as var:
        var.write(table)


def test_another_order_of_genes_in_another_census_changes_nothing(
    finished_run: Run, demo_census: str, tmp_path: Path
) -> None:
    """soma_joinids of genes differ between releases: rows of var swapped, with their counts."""
    uri = copy_census(demo_census, tmp_path / "census")
    genes = finished_run.path("hv_genes.pkl")
    first, second = pickle.loads(genes.read_bytes())[:2]
    with cellxgene_census.open_soma(uri=uri) as root:
        var = root["census_data"]["homo_sapiens"].ms["RNA"].var.read().concat().to_pandas()
        places = [int(var.index[var["feature_id"] == gene][0]) for gene in (first, second)]
    rename_genes(uri, {places[0]: second, places[1]: first})
    run = Run(tmp_path, uri)
    shutil.copytree(finished_run.directory, run.directory)
    assert run("create-latent-update", "--force") == 0
    model, description = load_safe(run.path("scvi.model"))
    with cellxgene_census.open_soma(uri=demo_census) as root:
        cells = cellxgene_census.get_anndata(root, "Homo sapiens", obs_coords=slice(0, 50))
    cells.var_names = cells.var["feature_id"]
    counts = cells[:, description.genes].X.toarray()
    counts[:, [0, 1]] = counts[:, [1, 0]]  # what the counts mean now
    latent = Encoder(model)(sp.csr_matrix(counts), np.zeros(len(counts), dtype=np.int32))
    np.testing.assert_allclose(np.load(run.path("latent.npy"))[: len(counts)], latent.mean, atol=1e-5)


def test_missing_genes_are_gated_and_listed(
    finished_run: Run, demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = copy_census(demo_census, tmp_path / "census")
    gene = pickle.loads(finished_run.path("hv_genes.pkl").read_bytes())
    with cellxgene_census.open_soma(uri=uri) as root:
        var = root["census_data"]["homo_sapiens"].ms["RNA"].var.read().concat().to_pandas()
    lost = var.index[var["feature_id"].isin(gene[:6])]
    rename_genes(uri, {int(place): f"LOST{place}" for place in lost})
    run = Run(tmp_path, uri)
    shutil.copytree(finished_run.directory, run.directory)
    assert run("create-latent-update", "--force") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "6 of the model's 200 genes are not in" in error
    assert "97.0% are there, genes.min_share asks for 98.0%" in error
    assert all(name in error for name in gene[:6])
    assert run("create-latent-update", "--force", "genes.min_share=0.9") == 0
    assert "6 of 200 genes are not in this Census and count as 0" in capsys.readouterr().err
    assert run.record("create-latent-update")["counts"]["genes_missing"] == 6


# --- bad input


def tampered(finished_run: Run, census: str, folder: Path) -> Run:
    run = Run(folder, census)
    shutil.copytree(finished_run.directory, run.directory)
    return run


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("open('/tmp/census-scvi-bomb', 'w').close()",))


def forged(old: bytes, new: bytes) -> bytes:
    """The genes file of two genes, with a part of it replaced."""
    sound = pickle.dumps(np.array(["ENSG00000000001", "ENSG00000000002"]), protocol=4)
    assert sound.count(old) == 1
    return sound.replace(old, new)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(_Bomb()),
        pickle.dumps(np.array([_Bomb()], dtype=object)),
        b"not a pickle",
        b"",
        pickle.dumps(["ENSG1"]),
        pickle.dumps(np.arange(3)),
        pickle.dumps(np.array(["ENSG1", "ENSG2"], dtype=object)),
        pickle.dumps(np.array(["ENSG1", "ENSG2"], dtype="S")),
        pickle.dumps(np.array([["ENSG1"], ["ENSG2"]])),
        pickle.dumps(np.array([], dtype=str)),
        forged(b"\x03U15", b"\x02O8"),
        forged(b"\x03U15", b"\x01O"),
        forged(b"\x03U15", b"\x02i8"),
        forged(b"\x03U15", b"\x03U14"),
        forged(b"\x03U15", b"\x0cU99999999999"),
        forged(b"\x89C", b"\x88C"),
        forged(b"K\x01K\x02\x85", b"K\x01K\x01\x85"),
        forged(b"K\x01K\x02\x85", b"K\x01K\xc8\x85"),
        pickle.dumps(np.array(["ENSG1", "ENSG2"]), protocol=4)[:-20],
        pickle.dumps(np.array(["ENSG1"]), protocol=4).replace(b"E\x00\x00\x00", b"E\x00\x00\x7f"),
    ],
    ids=[
        "code", "code in an array", "text", "empty file", "list", "numbers", "objects", "bytes", "two dimensions",
        "no genes", "pointers of 8 bytes", "pointers", "integers", "shorter names", "endless names", "Fortran order",
        "fewer than there are", "more than there are", "truncated", "no character",
    ],
)  # fmt: skip
def test_a_genes_file_that_is_not_as_prepare_writes_it_is_refused_and_runs_nothing(
    tmp_path: Path, content: bytes
) -> None:
    bomb = Path("/tmp/census-scvi-bomb")
    bomb.unlink(missing_ok=True)
    path = tmp_path / "hv_genes.pkl"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"is refused: it is not the pickled numpy array .* run scvi-prepare.py --force"
    ):
        read_genes(path)
    assert not bomb.exists()


@pytest.mark.parametrize("genes", [["ENSG1"], [f"ENSG{i:011d}" for i in range(300)], ["ä", "\U0001f9ec", "a b"]])
def test_a_genes_file_of_either_numpy_is_read(tmp_path: Path, genes: list[str]) -> None:
    path = tmp_path / "hv_genes.pkl"
    write_genes(path, genes)
    assert read_genes(path) == genes == pickle.loads(path.read_bytes()).tolist()
    path.write_bytes(path.read_bytes().replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray"))  # numpy 1
    assert read_genes(path) == genes


def test_genes_of_another_id_system_are_refused(
    finished_run: Run, demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tampered(finished_run, demo_census, tmp_path)
    write_genes(run.path("hv_genes.pkl"), [f"SYMBOL{i}" for i in range(200)])
    assert run("create-latent-update", "--force") == 2
    assert "hv_genes.pkl has" in capsys.readouterr().err
    # even where the manifest says that prepare wrote it
    text = run.path("manifest.json").read_text()
    from census_scvi.workspace.identity import file_identity

    old = finished_run.record("prepare")["outputs"]["hv_genes.pkl"]
    new = file_identity(run.path("hv_genes.pkl"))
    text = text.replace(old["sha256"][0], new["sha256"][0]).replace(f'"size": {old["size"]}', f'"size": {new["size"]}')
    run.path("manifest.json").write_text(text)
    assert run("create-latent-update", "--force") == 2
    error = capsys.readouterr().err
    assert "such as 'SYMBOL0', the model has 200 such as 'ENSG" in error
    assert "0 are shared" in error


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("census.organism=mus_musculus", "was trained on homo_sapiens, but census.organism is mus_musculus"),
        ("anndata.batch_key=[donor_id]", "was trained with anndata.batch_key"),
    ],
)
def test_a_config_of_another_model_is_refused(
    finished_run: Run, setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finished_run("create-latent-update", setting, "--force") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["prepare", "train"])
def test_before_its_inputs_exist(
    stage: str, demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, demo_census, train={"max_epochs": 1})
    if stage == "train":
        assert run("prepare") == 0
    assert run("create-latent-update") == 2
    assert f"does not exist; run scvi-{stage}.py first" in capsys.readouterr().err


def test_a_latent_that_is_not_scvi_tools_own_is_a_defect(
    finished_run: Run, demo_census: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof can fail: an encoder that is off by a little publishes nothing."""
    from census_scvi.stages import create_latent_update as stage

    real = stage.reference_latent
    monkeypatch.setattr(stage, "reference_latent", lambda *a: tuple(part + 1e-4 for part in real(*a)))
    run = tampered(finished_run, demo_census, tmp_path)
    run.path("latent.npy").unlink()
    assert run("create-latent-update", "--force") == 1
    assert not run.path("latent.npy").exists()


def test_dry_run_of_latent(finished_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = finished_run.path("manifest.json").read_bytes()
    assert finished_run("create-latent-update", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "1,500 cells x 200 genes" in out
    assert "final_scvi_optimized/" in out
    assert finished_run.path("manifest.json").read_bytes() == before


def test_done_is_skipped(finished_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = finished_run.path("manifest.json").read_bytes()
    for stage in ("prepare", "train", "create-latent-update"):
        assert finished_run(stage) == 0
        assert f"{stage} is done for these settings" in capsys.readouterr().err
    assert finished_run.path("manifest.json").read_bytes() == before


@pytest.mark.parametrize("cells", ["1e999", '"many"', "-1", "11", "[]"])
def test_a_damaged_count_of_embedded_cells_is_said(cells: str, tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text(f'{{"cells": {cells}}}')
    with pytest.raises(UserError, match=r"progress.json .*; --force embeds all cells again"):
        LatentStore(tmp_path, 10, 3)
