"""Locations of the results of annotate; this module has no slow imports."""

from __future__ import annotations

import re
from pathlib import Path

from census_scvi.annotation.settings import AnnotateSection
from census_scvi.counts.other_formats import check_cells_path
from census_scvi.errors import UserError
from census_scvi.files.writable import require_writable, require_writable_folder
from census_scvi.query.places import default_output, query_source
from census_scvi.query.settings import QuerySection
from census_scvi.workspace.result_files import ResultFiles

# Files of a trained classifier, and the report of its training.
MODEL_FILES = ("classifier.safetensors", "classifier.json", "genes.json")
_REPORTS = (".json", ".html", ".csv", ".png")


def annotated_file(query: QuerySection) -> Path:
    """The .h5ad to write."""
    target = Path(query.output) if query.output else default_output(query_source(query), "annotated")
    if target.suffix in _REPORTS:
        raise UserError(f"query.output ends in {target.suffix}, like the report; expected NAME.h5ad")
    return target


def model_folder(query: QuerySection, settings: AnnotateSection) -> Path:
    """Folder of the trained classifier."""
    if settings.model is not None:
        return Path(settings.model)
    target = annotated_file(query)
    return target.with_name(f"{target.stem}-model")


def has_model(folder: Path) -> bool:
    """Whether a classifier was saved in a folder."""
    return any((folder / name).exists() for name in MODEL_FILES)


def reference_source(query: QuerySection, settings: AnnotateSection) -> Path | None:
    """The file of the labelled cells, which may be the query's; None: the Census."""
    if settings.reference.file is None:
        return None
    source = Path(settings.reference.file)
    check_cells_path(source)
    return source


def same_source(query: QuerySection, settings: AnnotateSection) -> bool:
    """Whether the labelled cells are in the file of the query."""
    reference = reference_source(query, settings)
    return reference is not None and reference.samefile(query_source(query))


def annotate_results(query: QuerySection, settings: AnnotateSection) -> ResultFiles:
    """What an action writes.

    Raises
    ------
    UserError
        A file cannot be written or is an input, or a setting that the action needs is missing.
    """
    source = query_source(query)
    target = annotated_file(query)
    if settings.action == "train":
        if settings.method != "scnym":
            raise UserError(
                f"annotate.method {settings.method} is fitted to reference and query together and has no model to train"
                " beforehand: run annotate without `train`, or set annotate.method=scnym"
            )
        require_one_column(query)
        folder = model_folder(query, settings)
        require_writable_folder(folder, [*MODEL_FILES, "train.json"], "annotate.model")
        return ResultFiles(folder / MODEL_FILES[0], folder / "train.json", "annotate.model")
    if settings.action == "interpret":
        if settings.target is None:
            raise UserError("annotate.target is not set; give the label to explain: annotate.target='B cell'")
        target = target.with_name(f"{target.stem}-genes-{_file_name(settings.target, settings.source)}.csv")
    written = [target, target.with_suffix(".json"), target.with_suffix(".png" if target.suffix == ".csv" else ".html")]
    reference = reference_source(query, settings)
    for path in written:
        require_writable(path, "query.output")
        for setting, used in (("query.file", source), ("annotate.reference.file", reference)):
            if used is not None and path.exists() and path.samefile(used):
                raise UserError(f"query.output is {setting}, {used}; give another file")
    return ResultFiles(target, target.with_suffix(".json"), "query.output")


def require_one_column(query: QuerySection) -> None:
    """UserError if a classifier is to predict several columns of labels."""
    if len(query.labels) > 1:
        raise UserError(
            f"query.labels names {len(query.labels)} columns ({', '.join(query.labels)}), and a saved classifier"
            f" predicts one; name one, for example query.labels=[{query.labels[0]}]"
        )


def _file_name(target: str, source: str) -> str:
    name = target if source == "all" else f"{target}-{source}"
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower()
