"""Locations of a user's cells and of their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from census_scvi.config.run_names import SURGERY
from census_scvi.counts.other_formats import check_cells_path, files_of, folder_of_mtx
from census_scvi.errors import UserError
from census_scvi.files.writable import require_writable, require_writable_folder
from census_scvi.model.source import Kind, Source
from census_scvi.query.settings import QuerySection
from census_scvi.query.surgery.settings import COMPARE, NONE
from census_scvi.workspace import Workspace
from census_scvi.workspace.identity import file_identity
from census_scvi.workspace.result_files import ResultFiles

# Suffixes of the reports and the pictures next to the .h5ad.
_SUFFIXES = (".json", ".html", ".png")


def query_source(settings: QuerySection) -> Path:
    """The file with the cells; UserError if none is given or it does not exist."""
    if settings.file is None:
        raise UserError("query.file is not set; give the file with your cells: query.file=my-cells.h5ad")
    source = Path(settings.file)
    check_cells_path(source)
    return source


def query_size(source: Path) -> int:
    """Size of the file or folder with the cells, in bytes."""
    return sum(file.stat().st_size for file in files_of(source))


def query_identity(source: Path) -> dict[str, Any]:
    """Identity of the file with the cells, or of each file of a folder by name."""
    files = files_of(source)
    if files == [source]:
        return file_identity(source)
    return {str(file.relative_to(source if source.is_dir() else source.parent)): file_identity(file) for file in files}


def query_results(settings: QuerySection, directory: Path) -> ResultFiles:
    """The .h5ad to write and the report next to it.

    Raises
    ------
    UserError
        A file cannot be written or is the file with the cells, or there is no model.
    """
    source = query_source(settings)
    target = Path(settings.output) if settings.output else default_output(source, "mapped")
    if target.suffix in _SUFFIXES:
        raise UserError(f"query.output ends in {target.suffix}, like the report or a picture; expected NAME.h5ad")
    for path in (target, *companion_files(settings, target)):
        if path == adapted_folder(target):
            require_writable_folder(path, [], "query.output")
            _require_replaceable(path, settings.model)
        else:
            require_writable(path, "query.output")
        if path.exists() and path.samefile(source):
            raise UserError(f"query.output is query.file, {source}; give another file")
    with_model = (Kind.RUN, Kind.PUBLISHED, Kind.MODEL)
    if settings.vectors is not None:
        if settings.embedding is None and Source.at(str(directory)).kind is not Kind.RUN:
            Workspace(directory).require_run("give it in output.directory, or an embedding in query.embedding")
    elif settings.model is None and Source.at(str(directory)).kind not in with_model:
        Workspace(directory).require_run("give it in output.directory, or a published model in query.model")
    return ResultFiles(target, target.with_suffix(".json"), "query.output")


def _require_replaceable(folder: Path, model: str | None) -> None:
    """UserError if a folder is no adapted model, or is the model to adapt: the new model would replace it."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / SURGERY).exists():
        raise UserError(
            f"query.output: {folder} exists and is not a model that surgery wrote, and the adapted model would replace"
            " it; give another query.output, or move the folder away"
        )
    path = Source.at(model).path if model else None
    if path is not None and path.exists() and folder.samefile(path):
        raise UserError(f"query.model is {folder}, which the adapted model would replace; give another query.output")


def adapted_folder(target: Path) -> Path:
    """The folder next to the .h5ad for the model that `query.surgery` adapts."""
    return target.with_name(f"{target.stem}-model")


def default_output(source: Path, what: str) -> Path:
    """The .h5ad next to the file with the cells: `cells-mapped.h5ad`; next to a folder of 10x files for these."""
    place = (source.parent if folder_of_mtx(source) and source.is_file() else source).absolute()
    stem = place.name
    for suffix in (".gz", ".h5ad", ".zarr", ".h5", ".loom", ".csv", ".tsv", ".txt"):
        stem = stem.removesuffix(suffix)
    return (source.parent if place == source.absolute() else source.parent.parent) / f"{stem}-{what}.h5ad"


def companion_files(settings: QuerySection, target: Path) -> list[Path]:
    """What is written next to the .h5ad: pictures, reports of the label columns, the adapted model, the summary."""
    files = [quality_picture(target, labels) for labels in settings.labels] if settings.baseline_cells else []
    if settings.umap_cells:
        files.append(target.with_suffix(".png"))
    files += [named_after(target, labels, suffix) for labels in settings.labels for suffix in (".html", ".json")]
    if settings.surgery != NONE:
        files.append(adapted_folder(target))
    if settings.surgery == COMPARE:
        files += [named_after(target, "surgery", suffix) for suffix in (".html", ".json")]
    return [*dict.fromkeys(files), target.with_suffix(".json")]


def quality_picture(target: Path, labels: str) -> Path:
    """Path of the picture of the annotation quality of a label column."""
    return named_after(target, labels, ".png")


def named_after(target: Path, labels: str, suffix: str) -> Path:
    """NAME-<labels> with a suffix, next to NAME.h5ad."""
    return target.with_name(f"{target.stem}-{labels.replace('/', '_')}{suffix}")
