"""Recognise the format of files that are not .h5ad, and give the line of code that converts them."""

from __future__ import annotations

from pathlib import Path

import h5py

from census_scvi.errors import UserError

_READERS = {
    ".csv": "scanpy.read_csv({path!r})",
    ".tsv": "scanpy.read_text({path!r})",
    ".txt": "scanpy.read_text({path!r})",
    ".mtx": "scanpy.read_10x_mtx(<its folder>)",
    ".xlsx": "scanpy.read_excel({path!r}, <sheet>)",
    ".parquet": "anndata.AnnData(pandas.read_parquet({path!r}))",
}
_TRANSPOSE = " (add .T if the rows are genes)"
FORMATS = "an .h5ad, a zarr store, a 10x .h5, a folder with matrix.mtx, a Loom file, or a .csv or .tsv of cells x genes"
_IN_R = {".rds", ".rda", ".rdata", ".qs", ".h5seurat"}


def check_path(path: Path) -> None:
    """UserError unless there is a regular file at the path."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: {explain_path(path)}")
    if not path.is_file():  # reading a pipe or a device could block forever
        raise UserError(f"{path}: is not a regular file; expected an .h5ad")


def is_zarr(path: Path) -> bool:
    """Whether a folder is a zarr store."""
    return any((path / name).exists() for name in (".zgroup", "zarr.json", ".zattrs", ".zmetadata"))


def find_named(folder: Path, name: str) -> list[Path]:
    """Files of this name, which may be gzipped and have the prefix of a sample (GSM123_matrix.mtx.gz)."""
    return sorted(path for packed in ("", ".gz") for path in folder.glob(f"*{name}{packed}"))


def folder_of_mtx(path: Path) -> Path | None:
    """The folder of 10x files that a path names, itself or by its matrix.mtx; None if it names none."""
    if path.is_dir():
        return path if find_named(path, "matrix.mtx") else None
    return path.parent if path.name.removesuffix(".gz").endswith(".mtx") else None


def check_cells_path(path: Path) -> None:
    """UserError unless there is a file or folder at the path that may hold cells."""
    if not path.is_dir():
        check_path(path)
    elif not (is_zarr(path) or folder_of_mtx(path)):
        raise UserError(f"{path}: is a folder without cells; expected {FORMATS}")


def files_of(path: Path) -> list[Path]:
    """All files with the cells of a file or folder."""
    if folder := folder_of_mtx(path):
        names = ("matrix.mtx", "barcodes.tsv", "features.tsv", "genes.tsv")
        return [file for name in names for file in find_named(folder, name)]
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def explain_path(path: Path) -> str:
    """Format of a file that is not HDF5, and how to convert it to .h5ad; "" if the format is unknown."""
    if path.is_dir():
        return _explain_folder(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if ".zarr" in suffixes:
        return f"is a packed zarr store; unpack it, then {_convert('anndata.read_zarr(<the folder>)')}"
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed and suffixes[-1:] == [".gz"] and suffixes[-2:-1] not in ([kind] for kind in _READERS):
        return f"is compressed; unpack it first: gunzip {path.name}"
    kind = next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")
    if kind in _IN_R:
        return _from_r(kind)
    if kind not in _READERS:
        return ""
    note = _TRANSPOSE if kind in (".csv", ".tsv", ".txt", ".xlsx", ".parquet") else ""
    return f"is a {kind} file; {_convert(_READERS[kind].format(path=str(path)), note)}"


def _explain_folder(path: Path) -> str:
    if is_zarr(path):
        return f"is a zarr store; {_convert(f'anndata.read_zarr({str(path)!r})')}"
    if any((path / f"matrix.mtx{packed}").exists() for packed in ("", ".gz")):
        return f"is a folder of 10x files; {_convert(f'scanpy.read_10x_mtx({str(path)!r})')}"
    return "is a folder; expected an .h5ad file"


def explain_hdf5(file: h5py.File) -> str:
    """Format of an HDF5 file without obs and var, and how to convert it; "" if the format is unknown."""
    path = file.filename
    if "mod" in file:
        return (
            f"is a MuData file; write its RNA only: muon.read({path!r})['rna'].write_h5ad('cells.h5ad'); for"
            " CITE-seq, first put the proteins into its obsm: rna.obsm['protein_expression'] = prot.to_df()"
        )
    if "matrix" in file and isinstance(file["matrix"], h5py.Group):
        return f"is a 10x file; {_convert(f'scanpy.read_10x_h5({path!r})')}"
    if {"matrix", "row_attrs", "col_attrs"} <= set(file):
        return f"is a loom file; {_convert(f'scanpy.read_loom({path!r})')}"
    if "assays" in file or "meta.data" in file:
        return _from_r(".h5seurat")
    if any(isinstance(group, h5py.Group) and {"barcodes", "genes", "indptr"} <= set(group) for group in file.values()):
        return f"is a 10x file of an old version; {_convert(f'scanpy.read_10x_h5({path!r}, genome=<its group>)')}"
    return ""


def _convert(reader: str, note: str = "") -> str:
    return f"convert it: {reader}.write_h5ad('cells.h5ad'){note}"


def _from_r(kind: str) -> str:
    how = "SeuratDisk::Convert(file, dest = 'h5ad')" if kind == ".h5seurat" else "zellkonverter::writeH5AD(cells, file)"
    return f"is an R file ({kind}); convert it in R: {how}"
