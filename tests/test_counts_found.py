"""Where raw counts are: the one matrix that holds them is found, and what only looks like counts is not taken."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from census_scvi.counts.h5ad import open_file
from census_scvi.errors import UserError
from census_scvi.local_census.sources import open_h5ad
from census_scvi.query.alignment import AlignedCells
from census_scvi.query.cells import QueryCells

ORGANISM = "homo_sapiens"
N_CELLS, N_GENES = 60, 80
GENES = [f"ENSG{number:011d}" for number in range(1, N_GENES + 1)]


def counts(mean: float = 1.5, seed: int = 0, n_cells: int = N_CELLS) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    depth = rng.uniform(0.5, 2, (n_cells, 1))
    return sp.csr_matrix(rng.poisson(depth * mean * rng.gamma(0.5, 2, N_GENES)), dtype=np.float32)


ALL = counts()
SPLICED = sp.csr_matrix(np.random.default_rng(1).binomial(ALL.toarray().astype(int), 0.7), dtype=np.float32)
AMBIGUOUS = sp.csr_matrix(
    np.random.default_rng(2).binomial((ALL - SPLICED).toarray().astype(int), 0.1), dtype=np.float32
)
UNSPLICED = sp.csr_matrix(ALL - SPLICED - AMBIGUOUS)
VELOCITY = {"ambiguous": AMBIGUOUS, "spliced": SPLICED, "unspliced": UNSPLICED}
BINARY = sp.csr_matrix(ALL > 0, dtype=np.float32)
OTHER = counts(1.2, seed=3)


def normalised(matrix: sp.csr_matrix, total: float = 1e4) -> sp.csr_matrix:
    return sp.csr_matrix(matrix.multiply(total / matrix.sum(axis=1)), dtype=np.float32)


def logged(matrix: sp.csr_matrix, total: float = 1e4) -> sp.csr_matrix:
    return normalised(matrix, total).log1p()


def scaled(matrix: sp.csr_matrix) -> np.ndarray:
    values = logged(matrix).toarray()
    return (values - values.mean(axis=0)) / (values.std(axis=0) + 1e-3)


def with_raw(adata: ad.AnnData, matrix: sp.csr_matrix, genes: slice = slice(None)) -> ad.AnnData:
    """The cells, of which X and layers keep `genes`, beside a raw of all genes."""
    kept = adata[:, genes].copy()
    kept.raw = ad.AnnData(matrix, obs=adata.obs, var=adata.var)
    return kept


def cells(x: object, **layers: object) -> ad.AnnData:
    obs = pd.DataFrame(index=[f"cell-{number}" for number in range(N_CELLS)])
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=GENES), layers=layers)


FOUND: dict[str, tuple[ad.AnnData, str]] = {
    "velocyto whose X was made from spliced": (cells(logged(SPLICED), **VELOCITY), "layers/spliced"),
    "velocyto with the total": (cells(logged(ALL), matrix=ALL, **VELOCITY), "layers/matrix"),
    "velocyto with counts in X": (cells(ALL, **VELOCITY), "X"),
    "velocyto with spliced in X": (cells(SPLICED, matrix=ALL, **VELOCITY), "X"),
    "velocyto with a layer of counts": (cells(scaled(ALL), counts=ALL, **VELOCITY), "layers/counts"),
    "another name of counts": (cells(scaled(ALL), a=OTHER, UMI_counts=ALL), "layers/UMI_counts"),
    "raw": (with_raw(cells(scaled(ALL), **VELOCITY), ALL, slice(30)), "raw"),
    "raw is normalised, X scaled": (with_raw(cells(scaled(ALL), a=OTHER, b=ALL), logged(ALL)), "layers/b"),
    "log2 of CPM": (cells(normalised(ALL, 1e6).log1p() / np.log(2), a=OTHER, b=ALL), "layers/b"),
    "no logarithm": (cells(normalised(ALL), a=OTHER, b=ALL), "layers/b"),
    "half precision": (cells(logged(ALL).toarray().astype(np.float16), a=OTHER, b=ALL), "layers/b"),
    "some genes of X": (with_raw(cells(logged(ALL), a=OTHER), ALL, slice(30)), "raw"),
    "binary comes first": (cells(scaled(ALL), a=BINARY, b=ALL), "layers/b"),
    "counts are binary by name": (cells(scaled(ALL), counts=BINARY, b=ALL), "layers/b"),
    "rounded CPM in X": (cells(np.round(normalised(ALL, 1e6).toarray()), b=ALL), "layers/b"),
    "multiples": (cells(scaled(ALL), a=ALL * 10, b=ALL), "layers/b"),
    "nothing": (cells(scaled(ALL), a=sp.csr_matrix(ALL.shape, dtype=np.float32), b=ALL), "layers/b"),
    "a small part": (cells(scaled(ALL), a=AMBIGUOUS, b=ALL), "layers/b"),
    "a layer like X": (cells(ALL, a=ALL.tocsc(), b=OTHER), "X"),
    "counts like X": (cells(ALL, counts=ALL.toarray()), "layers/counts"),
    "raw with more genes than counts": (with_raw(cells(scaled(ALL), counts=ALL), ALL, slice(30)), "raw"),
    "one odd name": (cells(scaled(ALL), odd=ALL), "layers/odd"),
    "X alone": (cells(ALL), "X"),
}  # fmt: skip

SEVERAL = "matrices contain different whole numbers, and it is unclear which are the raw counts"
REFUSED: dict[str, tuple[ad.AnnData, str]] = {
    "velocyto whose X was made from the total": (
        cells(logged(ALL), **VELOCITY),
        rf"3 {SEVERAL}: layers/ambiguous \(medians per cell: \d+ counts, \d+ genes\), layers/spliced \(.*"
        r"for example [\w.: ]+=?layers/spliced, .*\(the sum of spliced, unspliced and ambiguous reads\)",
    ),
    "two layers": (cells(scaled(ALL), a=ALL, b=OTHER), rf"2 {SEVERAL}: layers/a \(.*, layers/b \("),
    "two names": (cells(scaled(ALL), counts=ALL, raw_counts=OTHER), rf"2 {SEVERAL}: layers/counts"),
    "raw and counts": (with_raw(cells(scaled(ALL), counts=ALL), OTHER), rf"2 {SEVERAL}: raw .*, layers/counts"),
    "only a part": (cells(scaled(ALL), unspliced=UNSPLICED), "only layers/unspliced .* a part of the reads"),
    "X was made from others": (cells(logged(ALL), odd=OTHER), "only layers/odd .* X was computed from other counts"),
    "only 0 and 1": (cells(BINARY), "only X .* it holds only 0 and 1"),
    "rounded CPM": (cells(np.round(normalised(ALL, 1e6).toarray())), "only X .* the same total in every cell"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_the_raw_counts_are_found(case: str, tmp_path: Path) -> None:
    adata, place = FOUND[case]
    assert QueryCells(adata).find_counts() == place
    adata.write_h5ad(tmp_path / "a.h5ad")
    with QueryCells(tmp_path / "a.h5ad") as query:
        assert query.find_counts() == place
    (source,) = open_h5ad(tmp_path / "a.h5ad", organism=ORGANISM)
    expected = {"layers/spliced": SPLICED}.get(place, SPLICED if "spliced in X" in case else ALL)
    built = pd.DataFrame(sp.vstack([block for _, block in source.blocks(17)]).toarray(), columns=source.var.feature_id)
    assert np.array_equal(built[GENES[: built.shape[1]]].to_numpy(), expected.toarray())


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_be_counts_is_refused_and_can_be_named(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adata, message = REFUSED[case]
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError, match=message) as error, QueryCells(tmp_path / "a.h5ad") as query:
        query.find_counts(setting="query.counts=")
    assert "query.counts=" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        open_h5ad(tmp_path / "a.h5ad", organism=ORGANISM)
    place = next(name for name in ("layers/unspliced", "layers/counts", "layers/b", "layers/odd", "X")
                 if name == "X" or name.removeprefix("layers/") in adata.layers)  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert QueryCells(adata).find_counts(place) == place
    assert ("used as raw counts, but it" in caplog.text) == (place == "X")
    assert open_h5ad(tmp_path / "a.h5ad", organism=ORGANISM, counts=place)


def test_cells_anywhere_in_the_file_are_looked_at(tmp_path: Path) -> None:
    """The first cells of X are whole numbers, the later ones are not."""
    many = counts(n_cells=3000)
    x = many.toarray()
    x[2000:] = np.log1p(x[2000:])
    adata = ad.AnnData(sp.csr_matrix(x), var=pd.DataFrame(index=GENES), layers={"odd": many})
    adata.write_h5ad(tmp_path / "a.h5ad")
    for source in (adata, tmp_path / "a.h5ad"):
        assert QueryCells(source).find_counts() == "layers/odd"
    (source,) = open_h5ad(tmp_path / "a.h5ad", organism=ORGANISM)
    assert (sp.vstack([block for _, block in source.blocks(1000)]) != many).nnz == 0


# --- every way of storing counts


def stored_dense(dtype: str, **options: object) -> Callable[[h5py.File, np.ndarray], None]:
    def store(file: h5py.File, values: np.ndarray) -> None:
        file.create_dataset("X", data=values.astype(dtype), **options)
        file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    return store


def stored_sparse(
    kind: str,
    data: str = "float32",
    index: str = "int32",
    pointer: str = "int32",
    change: object = None,
    **options: object,
) -> Callable[[h5py.File, np.ndarray], None]:
    def store(file: h5py.File, values: np.ndarray) -> None:
        matrix = sp.csr_matrix(values) if kind == "csr" else sp.csc_matrix(values)
        parts = (matrix.data, matrix.indices, matrix.indptr)
        if callable(change):
            parts = change(*parts)
        group = file.create_group("X")
        for name, part, dtype in zip(("data", "indices", "indptr"), parts, (data, index, pointer), strict=True):
            group.create_dataset(name, data=part.astype(dtype), **options)
        group.attrs.update({"encoding-type": f"{kind}_matrix", "encoding-version": "0.1.0", "shape": values.shape})

    return store


def unsorted(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray) -> tuple[np.ndarray, ...]:
    """Entries of each line in the reverse order."""
    order = np.concatenate([np.arange(a, b)[::-1] for a, b in pairwise(indptr)]).astype(int)
    return data[order], indices[order], indptr


def in_parts(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray) -> tuple[np.ndarray, ...]:
    """Every entry twice, a part of it each: what a matrix holds is their sum."""
    less = np.floor(data / 2)
    return np.stack([less, data - less], axis=1).ravel(), np.repeat(indices, 2), 2 * indptr


def old_form(file: h5py.File, values: np.ndarray) -> None:
    """As anndata 0.6 wrote it: obs and var are compound datasets, the categories in uns."""
    matrix = sp.csr_matrix(values)
    group = file.create_group("X")
    group.attrs.update({"h5sparse_format": b"csr", "h5sparse_shape": values.shape})
    for name in ("data", "indices", "indptr"):
        group[name] = getattr(matrix, name)
    for name, ids in {"obs": [f"cell-{n}" for n in range(len(values))], "var": GENES}.items():
        table = np.zeros(len(ids), dtype=[("index", "S16"), ("kind", "i1")])
        table["index"] = [text.encode() for text in ids]
        if name in file:
            del file[name]
        file[name] = table
    file.require_group("uns")["kind_categories"] = np.array([b"a"])


WHOLE = {f"dense {name}": stored_dense(name) for name in (
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64",
    "longdouble", ">f2", ">f4", ">f8", ">i4", ">i8", ">u2",
)}  # fmt: skip
LAYOUTS = WHOLE | {
    "dense in chunks": stored_dense("float32", chunks=(7, 5)),
    "dense gzip": stored_dense("float64", chunks=(9, 80), compression="gzip"),
    "dense lzf": stored_dense("int16", chunks=(9, 80), compression="lzf"),
    "dense shuffled, by columns": stored_dense(">f4", chunks=(60, 1), compression="gzip", shuffle=True),
    "csr int64 pointers": stored_sparse("csr", pointer="int64"),
    "csr int64 all": stored_sparse("csr", "int64", "int64", "int64"),
    "csr big-endian": stored_sparse("csr", ">f8", ">i4", ">i8"),
    "csr unsigned": stored_sparse("csr", "uint8", "uint16", "uint64"),
    "csr bool": stored_sparse("csr", "bool"),
    "csr float16": stored_sparse("csr", "float16"),
    "csr unsorted": stored_sparse("csr", change=unsorted),
    "csr in parts": stored_sparse("csr", "uint8", change=in_parts),
    "csr lzf": stored_sparse("csr", chunks=(32,), compression="lzf"),
    "csc": stored_sparse("csc"),
    "csc int64 pointers": stored_sparse("csc", "int32", "int64", "int64"),
    "csc big-endian": stored_sparse("csc", ">f4", ">i4", ">i4"),
    "csc bool": stored_sparse("csc", "bool"),
    "csc float16": stored_sparse("csc", "float16"),
    "csc unsorted": stored_sparse("csc", change=unsorted),
    "csc in parts": stored_sparse("csc", "int8", change=in_parts),
    "csc gzip": stored_sparse("csc", chunks=(32,), compression="gzip"),
    "anndata 0.6": old_form,
}  # fmt: skip


def large(layout: str) -> np.ndarray:
    """Counts up to what the layout holds; those of a gene in parts are more than a part's type does."""
    values = np.minimum(ALL.toarray(), 1) if "bool" in layout else ALL.toarray()
    values[5, 7] = 1 if "bool" in layout else 126 if "int8" in layout else 252 if "parts" in layout else 200
    return values[:, :8] if "bool" in layout else values  # too few to be told from counts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_of_storing_counts(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("census_scvi.counts.h5ad._CSC_WINDOW", 700)
    monkeypatch.setattr("census_scvi.counts.h5ad._DENSE_WINDOW", 900)
    expected = large(layout)
    genes = GENES[: expected.shape[1]]
    cells(ALL)[:, : len(genes)].write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        del file["X"]
        LAYOUTS[layout](file, expected)
    (source,) = open_h5ad(tmp_path / "a.h5ad", organism=ORGANISM)
    assert np.array_equal(sp.vstack([block for _, block in source.blocks(13)]).toarray(), expected)
    with QueryCells(tmp_path / "a.h5ad") as query:
        aligned = AlignedCells(query, genes[::-1], {}, ORGANISM, min_share=1.0)
        found = sp.vstack([block for _, block in aligned.blocks(13)])
    assert found.dtype == np.float32
    assert np.array_equal(found.toarray(), expected[:, ::-1])


def in_memory(kind: str) -> object:
    dense = ALL.toarray()
    match kind:
        case "float16" | ">f2" | ">f4" | ">i8" | "uint8" | "longdouble":
            return dense.astype(kind)
        case "fortran":
            return np.asfortranarray(dense)
        case "csr_array" | "csc_array" | "csc_matrix":
            return getattr(sp, kind)(ALL)
        case "csr int64 pointers":
            matrix = ALL.copy()
            matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
            return matrix
        case "csr float16":
            return sp.csr_matrix((ALL.data.astype(np.float16), ALL.indices, ALL.indptr), ALL.shape)
        case "csr in parts":
            return sp.csr_matrix(in_parts(ALL.data, ALL.indices, ALL.indptr), ALL.shape)
        case "masked":
            return np.ma.masked_array(dense)
        case "dask" | "dask sparse":
            array = pytest.importorskip("dask.array", reason="dask is not installed: pip install dask")
            chunks = array.from_array(dense, chunks=(25, 80))
            return chunks if kind == "dask" else chunks.map_blocks(sp.csr_matrix)
    return dense


MEMORY = (
    "float16", ">f2", ">f4", ">i8", "uint8", "longdouble", "fortran", "csr_array", "csc_array", "csc_matrix",
    "csr int64 pointers", "csr float16", "csr in parts", "masked", "dask", "dask sparse", "view", "backed",
    "backed csc",
)  # fmt: skip


@pytest.mark.parametrize("kind", MEMORY)
def test_every_way_of_holding_counts_in_memory(kind: str, tmp_path: Path) -> None:
    adata = cells(in_memory(kind))
    if kind == "view":
        adata = ad.concat([adata, adata], index_unique="-")[N_CELLS:]
    if kind.startswith("backed"):
        adata.X = ALL.tocsc() if "csc" in kind else ALL
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with QueryCells(adata) as query:
        aligned = AlignedCells(query, GENES[::-1], {}, ORGANISM, min_share=1.0)
        found = sp.vstack([block for _, block in aligned.blocks(13)])
    assert np.array_equal(found.toarray(), ALL.toarray()[:, ::-1])


# --- files that reach outside themselves, or declare what they do not hold


def external_storage(file: h5py.File, key: str, secret: Path) -> None:
    file.create_dataset(key, (4,), "i1", external=[(str(secret), 0, 4)])


def virtual(file: h5py.File, key: str, secret: Path) -> None:
    layout = h5py.VirtualLayout((4,), "i1")
    layout[:] = h5py.VirtualSource(str(secret), "data", (4,))
    file.create_virtual_dataset(key, layout)


def external_link(file: h5py.File, key: str, secret: Path) -> None:
    file[key] = h5py.ExternalLink(str(secret), "/data")


def dangling(file: h5py.File, key: str, secret: Path) -> None:
    file[key] = h5py.SoftLink("/no/such/place")


def circle(file: h5py.File, key: str, secret: Path) -> None:
    file[key] = h5py.SoftLink(f"/{key}")


def empty_giant(file: h5py.File, key: str, secret: Path) -> None:
    file.create_dataset(key, (10**6, 10**6), "f8", chunks=(1000, 1000), compression="gzip")


def unwritten(file: h5py.File, key: str, secret: Path) -> None:
    file.create_dataset(key, (10**9,), "i8")


HOSTILE = {
    external_storage: "stores its values in another file",
    virtual: "is a virtual dataset of other files",
    external_link: "is a link to another file",
    dangling: "is a link to /no/such/place, which is missing",
    circle: "is a link to /.*, which is missing",
    empty_giant: r"declares 8\.0 TB",
    unwritten: r"declares 8\.0 GB",
}
KEYS = ("X", "layers/stolen", "raw/X", "obs/stolen", "var/stolen", "obsm/stolen", "uns/deep/down/stolen", "other")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.__name__)
def test_a_file_that_is_not_whole_in_itself_is_refused_by_name(
    attack: Callable[[h5py.File, str, Path], None], key: str, tmp_path: Path
) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["data"] = np.arange(4, dtype=np.int8)
    cells(ALL).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        if key == "X":
            del file["X"]
        attack(file, key, tmp_path / "secret.h5")
    for opened in (QueryCells, lambda path: open_h5ad(path, organism=ORGANISM)):
        with pytest.raises(UserError, match=f"{key} {HOSTILE[attack]}") as error:
            opened(tmp_path / "a.h5ad")
        assert "\n" not in str(error.value)


def test_many_datasets_that_declare_much_together_are_refused(tmp_path: Path) -> None:
    cells(ALL).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        for number in range(20):
            file.create_dataset(f"uns/{number}", (60_000_000,), "i1")
    with pytest.raises(UserError, match=r"a\.h5ad declares 1\.2 GB in a file of"):
        open_h5ad(tmp_path / "a.h5ad", organism=ORGANISM)


def test_a_row_of_more_entries_than_there_are_genes_is_damage(tmp_path: Path) -> None:
    cells(ALL).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        n_cells, n_genes = file["X"].attrs["shape"]
        for name in ("data", "indices", "indptr"):
            del file["X"][name]
        ends = np.full(n_cells + 1, 9 * n_genes)
        ends[0] = 0
        file["X/data"], file["X/indptr"] = np.ones(9 * n_genes, np.float32), ends
        file["X/indices"] = np.tile(np.arange(n_genes), 9)
    with pytest.raises(UserError, match="X: indptr does not fit data and shape"):
        open_h5ad(tmp_path / "a.h5ad", organism=ORGANISM)


def test_links_within_a_file_are_read_and_circles_end(tmp_path: Path) -> None:
    cells(ALL).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        file["layers/same"] = h5py.SoftLink("/X")
        file["uns/circle"] = file["uns"]
        file["uns/root"] = h5py.SoftLink("/")
    with QueryCells(tmp_path / "a.h5ad") as query:
        assert query.find_counts() == "X"


def forged(name: str, position: int, value: int, kind: str) -> Callable[[h5py.File], None]:
    def forge(file: h5py.File) -> None:
        if kind == "csc":
            del file["X"]
            stored_sparse("csc")(file, ALL.toarray())
        file[f"X/{name}"][position] = value

    return forge


def reshaped(shape: object) -> Callable[[h5py.File], None]:
    return lambda file: file["X"].attrs.__setitem__("shape", shape)


FORGED = {
    "a giant shape": reshaped((10**9, 10**9)),
    "text for a shape": reshaped("large"),
    "a negative shape": reshaped((-60, 80)),
    "three dimensions": reshaped((60, 80, 2)),
    "index beyond the genes": forged("indices", 3, 10**6, "csr"),
    "negative index": forged("indices", 3, -5, "csr"),
    "pointer backwards": forged("indptr", 3, 10**6, "csr"),
    "pointer beyond the data": forged("indptr", -1, 10**6, "csr"),
    "index beyond the cells": forged("indices", 3, 10**6, "csc"),
    "negative row": forged("indices", 3, -5, "csc"),
    "pointer backwards in csc": forged("indptr", 3, 10**6, "csc"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_sparse_matrix_that_does_not_fit_together_is_refused(case: str, tmp_path: Path) -> None:
    cells(ALL).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        FORGED[case](file)
    message = r"do(es)? not fit|do not match|expected cells x genes"
    with pytest.raises(UserError, match=message):
        open_h5ad(tmp_path / "a.h5ad", organism=ORGANISM)
    with pytest.raises(UserError, match=message), QueryCells(tmp_path / "a.h5ad") as query:
        query.find_counts()


def test_a_filter_that_is_not_installed_is_said(tmp_path: Path) -> None:
    cells(ALL).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        del file["X/data"]
        data = file.create_dataset(
            "X/data", (ALL.nnz,), "f4", chunks=(ALL.nnz,), compression=32015, allow_unknown_filter=True
        )
        data.id.write_direct_chunk((0,), b"\0" * 20)
    for found in (
        lambda: QueryCells(tmp_path / "a.h5ad").find_counts(),
        lambda: open_h5ad(tmp_path / "a.h5ad", organism=ORGANISM),
    ):
        with pytest.raises(UserError, match=r"a filter that is not installed .*write_h5ad\(new, compression='gzip'\)"):
            found()


# --- files of other formats


def ten_x(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["matrix/barcodes"] = np.array([b"A"])
        file["matrix/features/id"] = np.array([b"ENSG"])


def loom(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["matrix"] = np.zeros((2, 2))
        for name in ("row_attrs", "col_attrs", "layers"):
            file.create_group(name)


def mudata(path: Path) -> None:
    with h5py.File(path, "w") as file:
        for name in ("mod/rna", "mod/prot", "obs", "var"):
            file.create_group(name)


def zarr_store(path: Path) -> None:
    path.mkdir()
    (path / ".zgroup").write_text('{"zarr_format": 2}')


def mtx_folder(path: Path) -> None:
    path.mkdir()
    (path / "matrix.mtx.gz").write_bytes(b"\x1f\x8b")


OTHER_FORMATS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a.zarr": (zarr_store, r"is a zarr store; convert it: anndata\.read_zarr\('.*a\.zarr'\)\.write_h5ad"),
    "filtered_feature_bc_matrix.h5": (ten_x, r"is a 10x file; convert it: scanpy\.read_10x_h5\('.*\.h5'\)\.write_h5ad"),
    "a.loom": (loom, r"is a loom file; convert it: .*read_loom"),
    "a.h5mu": (mudata, r"is a MuData file; write its RNA only"),
    "folder": (mtx_folder, r"is a folder of 10x files; convert it: scanpy\.read_10x_mtx"),
    "empty": (Path.mkdir, "is a folder; expected an .h5ad file"),
    "a.csv": (lambda path: path.write_text("gene,cell\n"), r"is a \.csv file; convert it: scanpy\.read_csv.*\.T if"),
    "a.tsv.gz": (lambda path: path.write_bytes(b"\x1f\x8b"), r"is a \.tsv file; convert it"),
    "a.mtx": (lambda path: path.write_text("%%MatrixMarket"), r"is a \.mtx file; convert it: scanpy\.read_10x_mtx"),
    "a.rds": (lambda path: path.write_bytes(b"X"), r"is an R file \(\.rds\); convert it in R: zellkonverter"),
    "a.h5ad.gz": (lambda path: path.write_bytes(b"\x1f\x8b"), r"is compressed; unpack it first: gunzip a\.h5ad\.gz"),
    "absent.h5ad": (lambda path: None, "no such file"),
    "pipe.h5ad": (os.mkfifo, "is not a regular file"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_files_of_other_formats_say_how_to_convert_them(name: str, tmp_path: Path) -> None:
    make, message = OTHER_FORMATS[name]
    make(tmp_path / name)
    for opened in (open_file, lambda path: open_h5ad(path, organism=ORGANISM)):
        with pytest.raises(UserError, match=message) as error:
            opened(tmp_path / name)
        assert "\n" not in str(error.value)
