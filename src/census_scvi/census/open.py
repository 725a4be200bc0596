"""Open a Census and read its identity."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tiledbsoma

from census_scvi.census.settings import CensusSection
from census_scvi.census.storage import refused_by_store, soma_context, use_settings
from census_scvi.errors import UserError
from census_scvi.files.uri import local_path, tiledb_place, without_credentials

log = logging.getLogger(__name__)

MEASUREMENT = "RNA"


@dataclass(frozen=True)
class Census:
    """An open Census and the Experiment of one organism.

    Attributes
    ----------
    root
        The root collection; must stay open while anything in it is read.
    experiment
        The Experiment of the organism.
    identity
        `uri`, `version`, `schema`, `created_on`, `organism` and `cells`, which identify the Census.
    """

    root: Any
    experiment: Any
    identity: dict[str, Any]


@contextmanager
def open_census(settings: CensusSection) -> Iterator[Census]:
    """Open the Census of the settings: `uri` if it is set, else the release `version`.

    Raises
    ------
    UserError
        The Census does not exist, cannot be reached or read, is not a Census, or does not have the organism.
    """
    where = without_credentials(settings.uri) or f"release {settings.version}"
    use_settings(settings.tiledb)
    path = local_path(settings.uri) if settings.uri else None
    if path is not None and path.is_file():
        raise UserError(f"census.uri {where} is a file; build a Census from .h5ad files with scvi-build-census.py")
    try:
        # `uri` has priority in the API, too; a version in addition to it would cause a network request.
        version = None if settings.uri else settings.version
        # Absolute, because records are read later, from another current folder.
        uri = settings.uri and tiledb_place(settings.uri, "census.uri")
        root = _open(uri, version)
    except (tiledbsoma.DoesNotExistError, tiledbsoma.SOMAError) as error:
        if settings.uri and (reason := refused_by_store(error)):
            raise UserError(f"Census {where} cannot be read: {reason}") from None
        reason = " ".join(str(error).split())
        raise UserError(
            f"Census {where}: it cannot be opened; set census.uri to a Census folder or URL ({reason})"
        ) from None
    except Exception as error:
        if settings.uri is None:
            raise UserError(
                f"Census {where} cannot be found ({_reason(error)});"
                " set census.version to a release, or census.uri to a local Census"
            ) from None
        if is_damage(error):
            raise cannot_be_read(f"Census {where}", error) from None
        raise
    with root:
        try:
            yield _describe(root, settings, where)
        except (tiledbsoma.SOMAError, RuntimeError) as error:
            if is_damage(error):
                raise cannot_be_read(f"Census {where}", error) from None
            raise


def _open(uri: str | None, version: str | None) -> Any:
    """Like `cellxgene_census.open_soma`. Its import doubles the import time and is only needed to find a release."""
    context = soma_context(uri)
    if uri is not None:
        return tiledbsoma.open(uri, mode="r", soma_type=tiledbsoma.Collection, context=context)
    import cellxgene_census

    return cellxgene_census.open_soma(census_version=version, context=context)


# Messages of TileDB for a missing file or changed bytes.
_DAMAGE = re.compile(
    r"Checksum|GZipException|FilterBuffer|FilterCreate|CompressionFilter|unfiltered tile|end of serialized data"
    r"|bad_alloc|Cannot allocate buffer|Deserialization|exceeds file size|(?:Array|Group) does not exist|No such file"
)


def is_damage(error: Exception) -> bool:
    """Whether an error of TileDB means changed bytes or a missing file."""
    return bool(_DAMAGE.search(str(error)))


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """UserError if an array or table cannot be read, with its location and the reason."""
    try:
        yield
    except (tiledbsoma.SOMAError, RuntimeError) as error:
        raise cannot_be_read(uri, error) from None


def cannot_be_read(what: str, error: Exception) -> UserError:
    """One-line error for a read error of TileDB."""
    message = str(error).strip()
    reason = message.rpartition("Error: ")[2].partition("\n")[0].partition(", expect")[0] or type(error).__name__
    if not is_damage(error):
        return UserError(f"{what} cannot be read ({reason})")
    named = re.search(r"file://[^'\"]+|s3://[^'\"\s]+", message)
    place = f"{what}, in {named[0]}," if named and named[0] not in what else what
    return UserError(
        f"{place} cannot be read ({reason}): a file is damaged or missing; restore it, or build the Census again"
    )


def _describe(root: Any, settings: CensusSection, where: str) -> Census:
    if "census_data" not in root or "census_info" not in root:
        raise UserError(f"Census {where}: a SOMA collection without census_data and census_info is not a Census")
    organisms = sorted(root["census_data"].keys())
    if settings.organism not in organisms:
        raise UserError(f"Census {where} has no organism {settings.organism!r}; it has {', '.join(organisms)}")
    experiment = root["census_data"][settings.organism]
    table = root["census_info"]["summary"]
    with reading(table.uri):
        summary = table.read().concat().to_pandas().set_index("label")["value"]
    identity = {
        "uri": without_credentials(root.uri),
        "version": None if settings.uri else settings.version,
        "schema": summary.get("census_schema_version"),
        "created_on": root.metadata.get("created_on"),
        "organism": settings.organism,
        "cells": int(experiment.obs.count),
    }
    log.info("Census %s: %s, %s cells", identity["uri"], settings.organism, f"{identity['cells']:,}")
    return Census(root, experiment, identity)


def _reason(error: Exception) -> str:
    if "Connection" in type(error).__name__:
        return "the list of releases cannot be reached; is there a network?"
    return str(error).strip().partition("\n")[0] or type(error).__name__
