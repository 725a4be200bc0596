"""Locations of a user's cells and of their results."""

from __future__ import annotations

from pathlib import Path

from census_scvi.counts.other_formats import check_path
from census_scvi.errors import UserError
from census_scvi.files.writable import require_writable
from census_scvi.model.source import Kind, Source
from census_scvi.query.settings import QuerySection
from census_scvi.workspace import Workspace
from census_scvi.workspace.result_files import ResultFiles

# Suffixes of the report and the pictures next to the .h5ad.
_SUFFIXES = (".json", ".png")


def query_source(settings: QuerySection) -> Path:
    """The file with the cells; UserError if none is given or it does not exist."""
    if settings.file is None:
        raise UserError("query.file is not set; give the .h5ad with your cells: query.file=my-cells.h5ad")
    source = Path(settings.file)
    check_path(source)
    return source


def query_results(settings: QuerySection, directory: Path) -> ResultFiles:
    """The .h5ad to write and the report next to it.

    Raises
    ------
    UserError
        A file cannot be written or is the file with the cells, or there is no model.
    """
    source = query_source(settings)
    target = Path(settings.output) if settings.output else source.with_name(f"{source.stem}-mapped.h5ad")
    if target.suffix in _SUFFIXES:
        raise UserError(f"query.output ends in {target.suffix}, like the report or a picture; expected NAME.h5ad")
    for path in (target, *companion_files(settings, target)):
        require_writable(path, "query.output")
        if path.exists() and path.samefile(source):
            raise UserError(f"query.output is query.file, {source}; give another file")
    with_model = (Kind.RUN, Kind.PUBLISHED, Kind.MODEL)
    if settings.model is None and Source.at(str(directory)).kind not in with_model:
        Workspace(directory).require_run("give it in output.directory, or a published model in query.model")
    return ResultFiles(target, target.with_suffix(".json"), "query.output")


def companion_files(settings: QuerySection, target: Path) -> list[Path]:
    """The files to write next to the .h5ad: pictures and the report."""
    pictures = [quality_picture(target, labels) for labels in settings.labels] if settings.baseline_cells else []
    if settings.umap_cells:
        pictures.append(target.with_suffix(".png"))
    return [*dict.fromkeys(pictures), target.with_suffix(".json")]


def quality_picture(target: Path, labels: str) -> Path:
    """Path of the picture of the annotation quality of a label column."""
    return target.with_name(f"{target.stem}-{labels.replace('/', '_')}.png")
