"""Fetch a published folder from any URL, check it, and load its model, or the model of a run directory."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import scvi
from fsspec import AbstractFileSystem
from fsspec.callbacks import TqdmCallback

from census_scvi.config.stages import script_of
from census_scvi.errors import UserError
from census_scvi.files.atomic import remove
from census_scvi.files.json_file import MOST_BYTES, read_json
from census_scvi.files.paths import expand_argument
from census_scvi.files.uri import file_system, leaves_folder
from census_scvi.model.families import SCVI, family_of
from census_scvi.model.published_record import check_record
from census_scvi.model.safe import DESCRIPTION, WEIGHTS, ModelDescription, load_safe
from census_scvi.model.source import PROVENANCE, Kind, Source
from census_scvi.workspace import Workspace
from census_scvi.workspace.identity import cache_folder, damage

log = logging.getLogger(__name__)

SEALED = "sealed_sample.h5ad"
FORMAT = 1


def seal_of(record: dict[str, Any]) -> str:
    """SHA-256 of the record (without its own seal)."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_provenance(folder: Path) -> dict[str, Any]:
    """The record of a published folder.

    Raises
    ------
    UserError
        The record is damaged, was changed, has another format, or names files outside its folder.
    """
    path = folder / PROVENANCE
    try:
        record = read_json(path)
        if not isinstance(record, dict):
            raise ValueError("it holds no JSON object")
        if record.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"{path} has format {str(record['format'])[:40]}, this version reads {FORMAT}; update census-scvi"
            )
        seal = record.pop("seal")
        check_record(record)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged ({reason}); fetch the published folder again") from None
    names = list(record["files"])
    if outside := [name for name in names if leaves_folder(name)]:
        raise UserError(f"{path} refers to {outside[0]!r}, which is outside its folder; do not trust it")
    if seal != seal_of(record):
        raise UserError(f"{path} was changed after it was written: its hash does not match")
    return record


def damaged_files(folder: Path, record: dict[str, Any]) -> list[str]:
    """Problems with the files of a published folder, one string per problem."""
    found = {name: damage(folder / name, identity) for name, identity in record["files"].items()}
    of_model = () if record["model"] is None else (WEIGHTS, DESCRIPTION, SEALED)
    unlisted = [f"{name} is not in the record" for name in of_model if name not in found]
    return [*unlisted, *(f"{name} {wrong}" for name, wrong in found.items() if wrong)]


def fetch(uri: str, cache: Path | None = None) -> Path:
    """The local folder of a publication: the folder itself if it is local, else a copy in the cache.

    Undamaged files in the cache are not fetched again. Use `damaged_files` to check the folder.

    Parameters
    ----------
    uri
        Folder, or any URL that fsspec reads.
    cache
        Folder for the copies; None: `CENSUS_SCVI_CACHE`, or `census-scvi` in the user's cache folder.

    Raises
    ------
    UserError
        `uri` is not a published folder, or cannot be read.
    """
    source = Source.at(uri)
    if (path := source.path) is not None:
        if source.kind is Kind.MISSING:
            raise UserError(f"{uri} does not exist; give a run directory, or a folder written by scvi-publish.py")
        if not (path / PROVENANCE).exists():
            raise UserError(f"{uri} has no {PROVENANCE}; give the folder `published` that scvi-publish.py wrote")
        return path
    folder = (cache or cache_folder()) / hashlib.sha256(uri.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        system, there = file_system(uri)
        _get(system, f"{there}/{PROVENANCE}", folder / PROVENANCE, MOST_BYTES)
        for name, identity in read_provenance(folder)["files"].items():
            if damage(folder / name, identity):
                _get(system, f"{there}/{name}", folder / name, identity["size"])
    except FileNotFoundError as error:
        raise UserError(f"{uri} is not a published folder: {error} does not exist") from None
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"{uri} cannot be read: {error}") from None
    return folder


def _get(system: AbstractFileSystem, source: str, target: Path, most_bytes: int) -> None:
    size, free = system.size(source) or 0, shutil.disk_usage(target.parent).free
    if size > most_bytes:
        raise ValueError(f"{source} has {size:,} bytes, expected at most {most_bytes:,}; it is not fetched")
    if size > free:
        raise ValueError(f"{source} has {size:,} bytes, and {target.parent} has {free:,} free; free some space")
    partial = target.with_name(target.name + ".partial")
    remove(partial)
    try:
        system.get_file(source, str(partial), callback=_Download(source, min(most_bytes, free)))
        partial.replace(target)
    finally:
        remove(partial)


class _Download(TqdmCallback):
    """Progress bar of a download that stops at too many bytes: a server may not report the size in advance."""

    def __init__(self, source: str, most_bytes: int) -> None:
        name = source.rsplit("/", 1)[-1]
        super().__init__({"desc": name, "unit": "B", "unit_scale": True, "leave": False, "disable": None})
        self._source, self._most_bytes = source, most_bytes

    def relative_update(self, inc: int = 1) -> None:
        """Count bytes; ValueError above the limit."""
        super().relative_update(inc)
        if self.value > self._most_bytes:
            raise ValueError(f"{self._source} has more than the {self._most_bytes:,} bytes expected; it is not fetched")


def load_model(uri: str, *, trust: bool = False, cache: Path | None = None) -> scvi.model.SCVI:
    """Load a published model, ready to embed cells. Unless `trust` is set, no file that it reads can run code.

    Parameters
    ----------
    uri
        Folder that scvi-publish.py wrote (or its URL, any that fsspec reads), a run directory, or its `scvi.model`.
    trust
        Also load a folder that has only scvi-tools' own `model.pt`. This file is a pickle: loading it executes any code
        that its author put into it.
    cache
        Folder for fetched files; None: `CENSUS_SCVI_CACHE`, or `census-scvi` in the user's cache folder.

    Returns
    -------
    A scvi-tools model with the batches that it was trained on.

    Raises
    ------
    UserError
        There is no model that can be loaded, or a file differs from the published one.
    """
    uri = expand_argument(uri, "uri")
    cache = None if cache is None else Path(expand_argument(cache, "cache"))
    source = Source.at(uri)
    if source.kind is Kind.PICKLE and source.path is not None:
        return _unpickle(source.path, trust=trust)
    return load_described(uri, cache=cache)[0]


def load_described(uri: str, *, cache: Path | None = None) -> tuple[scvi.model.SCVI, ModelDescription]:
    """Load a model and its description from the safe form; locations and errors as in `load_model`."""
    source = Source.at(uri)
    if source.kind is Kind.PICKLE:
        raise UserError(
            f"{uri} has the model only as scvi-tools' own file, a pickle; if you trust its author, import it once with"
            " scvi-import-model.py (import_model.folder), and use the imported one"
        )
    if (model := _checked_model(source)) is not None:
        return load_safe(model)
    folder = fetch(uri, cache)
    record = read_provenance(folder)
    if record["model"] is None:
        raise UserError(
            f"{uri} is an embedding that was published without its model; open its Census to read it:"
            f" Atlas.open(census=..., embedding={record['embedding']['name']!r})"
        )
    if wrong := damaged_files(folder, record):
        raise UserError(f"{uri} differs from what was published: {'; '.join(wrong)}")
    return load_safe(folder)


def _checked_model(source: Source) -> Path | None:
    """The folder of a model in its safe form, checked if it is in a run directory; None for another source."""
    path = source.path
    if path is None:
        return None
    run, name = (path, None) if source.run else (path.parent, path.name)
    record = Workspace(run).whole_record("train")
    if record is None or name not in (None, record["artifacts"][0]):
        return path if source.kind is Kind.MODEL else None
    model = str(record["artifacts"][0])
    Workspace(run).check("train", [f"{model}/{DESCRIPTION}", f"{model}/{WEIGHTS}"])
    warn_if_running_again(Workspace(run), "train")
    return run / model


def warn_if_running_again(workspace: Workspace, stage: str) -> None:
    """Warn if a stage was started again with --force and has not finished: its earlier result is used."""
    if stage in workspace.manifest().get("redoing", {}):
        script = script_of(stage)
        log.warning(
            "%s: %s --force has not finished; using its earlier result. Run %s again to finish it",
            workspace.directory,
            script,
            script,
        )


def _unpickle(folder: Path, *, trust: bool) -> scvi.model.SCVI:
    if not trust:
        raise UserError(
            f"{folder} has the model only as scvi-tools' own file: a pickle, and loading it executes any code that its"
            " author put into it; if you trust the author, use load_model(..., trust=True)"
        )
    registry = scvi.model.SCVI.load_registry(str(folder))
    family = family_of(str(registry.get("model_name", SCVI)), str(folder))
    model: scvi.model.SCVI = family.model_class.load(
        str(folder), adata=None if (folder / "adata.h5ad").exists() else False
    )
    return model
