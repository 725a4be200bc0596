"""Cells in every format and scale: the same counts are read from all of them, and what is unclear is refused."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from census_scvi.counts.log_normalized import Normalization, inspect
from census_scvi.counts.raw_counts import sample_spans
from census_scvi.errors import UserError
from census_scvi.query.cells import QueryCells

N_CELLS = 30
IDS = [f"ENSG{number:011d}" for number in range(1, 41)]
SYMBOLS = ["ACTB", "GAPDH", "B2M", "RPL3", "RPS4X", *(f"GENE{number}" for number in range(35))]
NAMES = [f"cell-{number}" for number in range(N_CELLS)]
COUNTS = sp.csr_matrix(
    np.random.default_rng(0).poisson(np.random.default_rng(1).gamma(0.5, 4, (N_CELLS, len(IDS)))), dtype=np.float32
)
CELLS = ad.AnnData(COUNTS, pd.DataFrame({"label": ["a", "b", "c"] * 10}, index=NAMES), pd.DataFrame(index=IDS))


def strings(values: list[str]) -> np.ndarray:
    return np.array([value.encode() for value in values])


def h5ad(folder: Path) -> Path:
    CELLS.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def zarr_store(folder: Path, kind: type = sp.csr_matrix) -> Path:
    cells = ad.AnnData(kind(COUNTS), CELLS.obs, CELLS.var)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells.write_zarr(folder / "cells.zarr")
    return folder / "cells.zarr"


def zarr_by_gene(folder: Path) -> Path:
    return zarr_store(folder, sp.csc_matrix)


def zarr_dense(folder: Path) -> Path:
    return zarr_store(folder, lambda matrix: matrix.toarray())


def write_ten_x(group: h5py.Group) -> None:
    """The matrix in the layout of Cell Ranger: columns are cells."""
    by_cell = sp.csc_matrix(COUNTS.T)
    for name in ("data", "indices", "indptr"):
        group[name] = getattr(by_cell, name).astype("i4" if name == "data" else "i8")
    group["shape"] = np.array([len(IDS), N_CELLS])
    group["barcodes"] = strings(NAMES)


def ten_x(folder: Path) -> Path:
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        write_ten_x(file.create_group("matrix"))
        features = {"id": IDS, "name": SYMBOLS, "feature_type": ["Gene Expression"] * 40, "genome": ["GRCh38"] * 40}
        for name, values in features.items():
            file[f"matrix/features/{name}"] = strings(values)
    return folder / "filtered_feature_bc_matrix.h5"


def old_ten_x(folder: Path) -> Path:
    with h5py.File(folder / "matrix.h5", "w") as file:
        write_ten_x(file.create_group("GRCh38"))
        file["GRCh38/genes"], file["GRCh38/gene_names"] = strings(IDS), strings(SYMBOLS)
    return folder / "matrix.h5"


def mtx_folder(folder: Path) -> Path:
    with gzip.open(folder / "GSM1_matrix.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, sp.coo_matrix(COUNTS.T.astype(int)))
    rows = "".join(f"{one}\t{other}\tGene Expression\n" for one, other in zip(IDS, SYMBOLS, strict=True))
    with gzip.open(folder / "GSM1_features.tsv.gz", "wt") as file:
        file.write(rows)
    (folder / "GSM1_barcodes.tsv").write_text("\n".join(NAMES) + "\n")
    return folder


def mtx_file(folder: Path) -> Path:
    return mtx_folder(folder) / "GSM1_matrix.mtx.gz"


def loom(folder: Path) -> Path:
    with h5py.File(folder / "cells.loom", "w") as file:
        file["matrix"] = COUNTS.T.toarray()
        file["layers/doubled"] = 2 * COUNTS.T.toarray()
        file["row_attrs/Accession"], file["row_attrs/Gene"] = strings(IDS), strings(SYMBOLS)
        file["row_attrs/length"] = np.arange(40)
        file["col_attrs/CellID"], file["col_attrs/label"] = strings(NAMES), strings(CELLS.obs["label"].tolist())
    return folder / "cells.loom"


def frame() -> pd.DataFrame:
    return pd.DataFrame(COUNTS.toarray().astype(int), NAMES, IDS)


def csv(folder: Path) -> Path:
    frame().assign(label=CELLS.obs["label"]).to_csv(folder / "cells.csv")
    return folder / "cells.csv"


def tsv(folder: Path) -> Path:
    frame().to_csv(folder / "cells.tsv.gz", sep="\t", index_label="barcode")
    return folder / "cells.tsv.gz"


def csv_of_r(folder: Path) -> Path:
    """write.table of R: the header has one name less than the rows; cells are numbered."""
    text = frame().set_axis(range(1, N_CELLS + 1)).to_csv(sep=";")
    (folder / "cells.txt").write_text(text.removeprefix(";"))
    return folder / "cells.txt"


def csv_without_cell_names(folder: Path) -> Path:
    frame().to_csv(folder / "cells.csv", index=False)
    return folder / "cells.csv"


def turned_csv(folder: Path) -> Path:
    frame().T.to_csv(folder / "genes.csv")
    return folder / "genes.csv"


FORMATS = [
    h5ad, zarr_store, zarr_by_gene, zarr_dense, ten_x, old_ten_x, mtx_folder, mtx_file, loom, csv, tsv, csv_of_r,
    csv_without_cell_names, turned_csv,
]  # fmt: skip


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_every_format_gives_the_same_cells(write: Callable[[Path], Path], tmp_path: Path) -> None:
    with QueryCells(write(tmp_path)) as cells:
        place = cells.find_counts("X")
        assert cells.var(place).index.tolist() == IDS
        blocks = list(cells.blocks(place, 7))
        read = sp.vstack([block for _, block in blocks])
        assert [start for start, _ in blocks] == list(range(0, N_CELLS, 7))
        assert (read != COUNTS).nnz == 0
        assert cells.sample(place).shape == COUNTS.shape
        named = write not in (csv_of_r, csv_without_cell_names)
        assert cells.obs.index.tolist()[-1] == (NAMES[-1] if named else "30" if write is csv_of_r else "29")
        if write in (h5ad, zarr_store, loom, csv):
            assert cells.obs["label"].tolist() == CELLS.obs["label"].tolist()


def test_several_matrices_of_a_loom_are_places(tmp_path: Path) -> None:
    with QueryCells(loom(tmp_path)) as cells:
        assert cells.places == ["X", "layers/doubled"]
        doubled = sp.vstack([block for _, block in cells.blocks(cells.find_counts("layers/doubled"), 10)])
    assert (doubled != 2 * COUNTS).nnz == 0


# --- what cannot be read


def loom_without_genes(folder: Path) -> Path:
    path = loom(folder)
    with h5py.File(path, "r+") as file:
        del file["row_attrs/Accession"], file["row_attrs/Gene"]
    return path


def text_file(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return write


def other_barcodes(folder: Path) -> Path:
    (mtx_folder(folder) / "GSM1_barcodes.tsv").write_text("A\nB\n")
    return folder


def two_samples(folder: Path) -> Path:
    (mtx_folder(folder) / "GSM2_matrix.mtx").write_text("%%MatrixMarket")
    return folder


def cut_mtx(folder: Path) -> Path:
    (mtx_folder(folder) / "GSM1_matrix.mtx.gz").write_bytes(b"\x1f\x8b")
    return folder


def two_genomes(folder: Path) -> Path:
    path = old_ten_x(folder)
    with h5py.File(path, "r+") as file:
        file.copy("GRCh38", "mm10")
    return path


def other_shape(folder: Path) -> Path:
    path = ten_x(folder)
    with h5py.File(path, "r+") as file:
        file["matrix/shape"][0] = 39
    return path


def zarr_with_pickle(folder: Path) -> Path:
    path = zarr_store(folder)
    array = next(file for file in path.rglob(".zarray") if file.parent.name == "_index")
    content = json.loads(array.read_text())
    array.write_text(json.dumps(content | {"filters": [{"id": "pickle"}]}).replace("pickle", "\\u0070ickle"))
    return path


def zarr_of_absent_values(folder: Path) -> Path:
    path = zarr_store(folder)
    (path / ".zmetadata").unlink()
    content = json.loads((path / "X" / "data" / ".zarray").read_text())
    (path / "X" / "data" / ".zarray").write_text(json.dumps(content | {"shape": [10**12]}))
    return path


def cut_zarr(folder: Path) -> Path:
    path = zarr_store(folder)
    (path / "obs" / ".zgroup").write_text("{")
    return path


UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "loom without genes": (loom_without_genes, "has no names of genes: expected text in row_attrs/Gene .* are length;"),
    "csv without header": (text_file("a.csv", "c1,0,3,1\nc2,4,0,0\n"), r"has no header: .*\(0, 3, 1, \.\.\.\) instead"),
    "csv of one column": (text_file("a.csv", "a b c\n1 2 3\n"), "has one column; expected one row per cell"),
    "empty csv": (text_file("a.csv", "\n"), "has 0 rows; expected one row per cell and one column per gene"),
    "ragged csv": (text_file("a.csv", ",a,b\nc1,1,2\nc2,1\n"), "the first row has 3 columns, other rows 2"),
    "a gene twice": (text_file("a.csv", ",a,a\nc1,1,2\n"), "1 names of columns occur several times, such as 'a'"),
    "a missing value": (text_file("a.csv", ",a,b\nc1,1,\nc2,1,2\n"), "column 'b', row 2 is empty; expected a number"),
    "text among numbers": (text_file("a.csv", ",a,b\nc1,1,2\nc2,1,x\n"), "column 'b', row 3 has 'x'; expected a num"),
    "other barcodes": (other_barcodes, r"is \(40, 30\), features x barcodes \(40, 2\): the files do not belong"),
    "two samples": (two_samples, "has several files matrix.mtx .*put the files of each sample into a folder"),
    "cut mtx": (cut_mtx, "not a complete matrix in MatrixMarket format"),
    "mtx alone": (text_file("matrix.mtx", "%%MatrixMarket"), r"has no barcodes.tsv \(or .gz\)"),
    "two genomes": (two_genomes, r"has matrices of several genomes \(GRCh38, mm10\)"),
    "10x of another shape": (other_shape, r"is \[39, 30\], features x barcodes \[40, 30\]; the file is damaged"),
    "zarr that runs code": (zarr_with_pickle, "uses the codec pickle, which can run code and is not read"),
    "zarr of absent values": (zarr_of_absent_values, "X/data declares .* but the store contains 0% of it"),
    "damaged zarr": (cut_zarr, "damaged metadata of a zarr store"),
    "another format": (text_file("a.parquet", "PAR1"), r"is a \.parquet file; convert it"),
    "no format": (text_file("a.bin", "x"), "is not an .h5ad, a zarr store, .* a .csv or .tsv of cells x genes"),
    "an empty folder": (lambda folder: folder, "is a folder without cells; expected an .h5ad, a zarr store"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_one_line(case: str, tmp_path: Path) -> None:
    write, message = UNREADABLE[case]
    with pytest.raises(UserError, match=message) as error:
        QueryCells(write(tmp_path))
    assert "\n" not in str(error.value)


# --- log-normalised values


def logged(counts: sp.csr_matrix, total: float = 1e6, base: float = np.e) -> sp.csr_matrix:
    values = sp.csr_matrix(counts.multiply(total / np.maximum(counts.sum(axis=1), 1)))
    values.data = np.log1p(values.data) / np.log(base)
    return values.astype(np.float32)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e4, 1e6, 347.0]),
    st.sampled_from([np.e, 2, 10]),
    st.sampled_from(["all", "some genes", "other factors"]),
)
def test_counts_are_recovered_from_any_logarithm(seed: int, total: float, base: float, change: str) -> None:
    generator = np.random.default_rng(seed)
    counts = sp.csr_matrix(generator.poisson(generator.gamma(0.3, 3, (40, 60))), dtype=np.float64)
    dense = counts.toarray()
    dense[:, 0], dense[3] = 1, 0  # 1 is the smallest count of every cell with counts
    counts = sp.csr_matrix(dense)
    values = logged(counts, total, base)
    if change == "some genes":
        counts, values = sp.csr_matrix(counts[:, :25]), sp.csr_matrix(values[:, :25])
    if change == "other factors":  # as of size factors: no cell has the same total
        linear = sp.csr_matrix(counts.multiply(generator.uniform(0.3, 3, (40, 1))))
        values = sp.csr_matrix((np.log1p(linear.data) / np.log(base), linear.indices, linear.indptr), linear.shape)
    with QueryCells(ad.AnnData(values), "log_normalized") as cells:
        place = cells.find_counts()
        read = sp.vstack([block for _, block in cells.blocks(place, 7)])
    assert (read != counts).nnz == 0


def test_values_without_counts_keep_their_proportions() -> None:
    """log(TPM + 1): no count can be recovered, and the cells get 10,000 counts each."""
    shares = np.random.default_rng(0).dirichlet(np.full(200, 0.3), 30)
    values = np.log1p(1e6 * shares)
    with QueryCells(ad.AnnData(values), "log_normalized") as cells:
        read = cells.sample(cells.find_counts()).toarray()
    assert np.abs(read / 1e4 - shares).max() <= 0.5e-4 + 1e-9
    assert (read == np.round(read)).all()


def noise(_: sp.csr_matrix) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.gamma(2, 1, (N_CELLS, 40)) * (generator.random((N_CELLS, 40)) < 0.5)


def scaled(counts: sp.csr_matrix) -> np.ndarray:
    values = logged(counts).toarray()
    return values - values.mean(axis=0)


DECLARED: dict[str, tuple[Callable[[sp.csr_matrix], object], str, str]] = {
    "log values as counts": (logged, "counts", "X holds log1p of normalised counts: .* query.values=log_normalized"),
    "log2 values as counts": (lambda c: logged(c, 1e6, 2), "counts", r"log2\(x \+ 1\) of normalised .*log_normalized"),
    "counts as log values": (
        lambda c: c, "log_normalized", r"X holds whole numbers up to \d+, which are raw counts; set query.values=",
    ),
    "scaled": (scaled, "log_normalized", r"X holds negative values \(-.*\): scaled or corrected"),
    "scaled as counts": (scaled, "counts", "X holds .* not a raw count"),
    "CPM": (lambda c: logged(c).expm1(), "log_normalized", "too large for logarithms: normalised without a logarithm"),
    "imputed": (noise, "log_normalized", "not logarithms of counts scaled per cell .*corrected, imputed"),
    "missing": (lambda c: np.where(c.toarray() > 2, np.nan, 0.5), "log_normalized", "holds missing or infinite"),
    "nothing": (lambda c: 0 * c.toarray(), "log_normalized", "X holds only 0"),
}  # fmt: skip


@pytest.mark.parametrize("place", ["X", None])
@pytest.mark.parametrize("case", DECLARED)
def test_values_are_compared_with_what_was_declared(case: str, place: str | None) -> None:
    change, values, message = DECLARED[case]
    with pytest.raises(UserError, match=message) as error, QueryCells(ad.AnnData(change(COUNTS)), values) as cells:
        cells.find_counts(place, setting="query.counts=")
    assert "\n" not in str(error.value)


def test_the_place_of_log_values_is_found_and_counts_next_to_it_are_not_used() -> None:
    both = CELLS.copy()
    both.layers["logged"] = logged(COUNTS)
    with QueryCells(both, "log_normalized") as cells:
        assert cells.find_counts() == "layers/logged"
        assert (cells.sample("layers/logged") != COUNTS).nnz == 0
    with QueryCells(both) as cells:
        assert cells.find_counts() == "X"


def test_real_blood_is_recovered(real_data: Path) -> None:
    blood = ad.read_h5ad(real_data / "pbmc_multi_human.h5ad", backed="r")[4000:5000].to_memory()
    values = logged(blood.X, 1e4)
    found = inspect_memory(values)
    assert found == Normalization("log1p", exact=True)
    assert (found.counts(values) != blood.X).sum() <= 1e-4 * blood.X.nnz


def inspect_memory(values: sp.csr_matrix) -> object:
    with QueryCells(ad.AnnData(values)) as cells:
        assert sample_spans(len(cells))
        return inspect(cells._matrices["X"], len(cells))
