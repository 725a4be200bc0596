"""The folder that is published beside an embedding: the model, a sealed sample of cells, and how both were made."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import anndata as ad
import fsspec
import numpy as np
import numpy.typing as npt
import pandas as pd
import scvi

from census_scvi.census.embedding import local_path
from census_scvi.counts.row_hash import row_hashes
from census_scvi.errors import UserError
from census_scvi.model.safe import DESCRIPTION, WEIGHTS, ModelDescription, save_safe
from census_scvi.stages.sample import Sample
from census_scvi.workspace.atomic import remove, sync_tree, write_json
from census_scvi.workspace.identity import damage, identities

PROVENANCE, SEALED = "provenance.json", "sealed_sample.h5ad"
COUNT_HASH, LATENT = "count_hash", "X_scvi"
_FORMAT = 1
_SEALED_COLUMNS = ("soma_joinid", "observation_joinid", "dataset_id", "cell_type", "batch")


def write_published(
    folder: Path,
    model: scvi.model.SCVI,
    description: ModelDescription,
    sample: Sample,
    latent: npt.NDArray[np.float32],
    record: dict[str, Any],
) -> None:
    """Make the folder, whole or not at all.

    Parameters
    ----------
    folder
        Where.
    model, description
        The trained model.
    sample
        The cells that are sealed.
    latent
        float32 (cells, n_latent): their embedding, as it is published.
    record
        The provenance; identities of the files and a seal are added.
    """
    partial = folder.with_name(folder.name + ".partial")
    remove(partial)
    partial.mkdir()
    save_safe(model, description, partial)
    obs = sample.obs[[name for name in _SEALED_COLUMNS if name in sample.obs]].copy()
    obs.index = pd.Index(sample.joinids.astype(str))
    obs[COUNT_HASH] = row_hashes(sample.counts)
    var = pd.DataFrame(index=pd.Index(description.genes, name="feature_id"))
    ad.AnnData(sample.counts, obs=obs, var=var, obsm={LATENT: latent}).write_h5ad(partial / SEALED, compression="gzip")
    record = {**record, "format": _FORMAT, "files": identities(partial, [WEIGHTS, DESCRIPTION, SEALED])}
    write_json(partial / PROVENANCE, {**record, "seal": _seal(record)})
    sync_tree(partial)
    partial.rename(folder)


def _seal(record: dict[str, Any]) -> str:
    """SHA-256 of the record itself."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_provenance(folder: Path) -> dict[str, Any]:
    """The record of a published folder.

    Raises
    ------
    UserError
        It is missing, damaged, changed, of a newer format, or names files outside its folder.
    """
    path = folder / PROVENANCE
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8")))
        seal, form = record.pop("seal"), record["format"]
        names = list(record["files"])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a folder that scvi-publish.py wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); fetch the published folder again") from None
    if form != _FORMAT:
        raise UserError(f"{path} has format {form!r}, this version reads {_FORMAT}; update census-scvi")
    if outside := [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]:
        raise UserError(f"{path} names {outside[0]!r}, which lies outside its folder; do not trust it")
    if seal != _seal(record):
        raise UserError(f"{path} was changed after it was written: its seal does not fit")
    return record


def damaged_files(folder: Path, record: dict[str, Any]) -> list[str]:
    """What is wrong with the files of a published folder, a line each."""
    found = {name: damage(folder / name, identity) for name, identity in record["files"].items()}
    return [f"{name} {wrong}" for name, wrong in found.items() if wrong]


def copy_to(folder: Path, uri: str, *, replace: bool) -> None:
    """Copy the published folder to another folder or URL.

    On a local disk it appears in one step; elsewhere the provenance comes last.

    Raises
    ------
    UserError
        Something else is there and `replace` is false, or the place cannot be written.
    """
    try:
        system, target = fsspec.url_to_fs(uri)
        if system.exists(f"{target}/{PROVENANCE}"):
            with system.open(f"{target}/{PROVENANCE}", "rb") as file:
                if file.read() == (folder / PROVENANCE).read_bytes():
                    return
        if system.exists(target) and system.ls(target) and not replace:
            raise UserError(
                f"publish.model_uri {uri} is not empty; set publish.replace to true to replace what is there"
            )
        if (path := local_path(uri)) is not None:
            _copy_local(folder, path)
            return
        names = [path.name for path in folder.iterdir() if path.name != PROVENANCE]
        for name in [*sorted(names), PROVENANCE]:
            system.put_file(str(folder / name), f"{target}/{name}")
    except (ImportError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and local_path(uri) is not None:
            raise  # a full disk, a missing permission
        raise UserError(f"publish.model_uri {uri} cannot be written: {error}") from None


def _copy_local(folder: Path, target: Path) -> None:
    partial, aside = (target.with_name(target.name + ending) for ending in (".partial", ".old"))
    for leftover in (partial, aside):
        remove(leftover)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, partial)
    sync_tree(partial)
    if target.exists():
        target.rename(aside)
    partial.rename(target)
    remove(aside)


def fetch(uri: str, target: Path) -> Path:
    """A published folder as a local one: itself where it is local, else its files, copied into `target`."""
    if (path := local_path(uri)) is not None:
        return path
    try:
        system, source = fsspec.url_to_fs(uri)
        target.mkdir(parents=True, exist_ok=True)
        for name in (PROVENANCE, WEIGHTS, DESCRIPTION, SEALED):
            system.get_file(f"{source}/{name}", str(target / name))
    except FileNotFoundError as error:
        raise UserError(f"{uri} is no published folder: {error} does not exist") from None
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"{uri} cannot be read: {error}") from None
    return target
