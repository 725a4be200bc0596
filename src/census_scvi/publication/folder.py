"""Writes the folder that is published with an embedding, and copies it elsewhere.

The folder holds the model, a sealed sample of cells, and their provenance. The model is stored twice: in the safe form,
the only one that this project reads, and in the format of scvi-tools' model hub.
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scvi
from fsspec import AbstractFileSystem

from census_scvi.errors import UserError
from census_scvi.files.atomic import exchange, remove, sync, sync_tree, write_json
from census_scvi.files.uri import file_system, local_path
from census_scvi.model.families import family_of
from census_scvi.model.published import FORMAT, SEALED, seal_of
from census_scvi.model.safe import DESCRIPTION, WEIGHTS, ModelDescription, load_safe, save_safe
from census_scvi.model.source import PROVENANCE
from census_scvi.publication.card import PICTURE, learning_curve, model_card
from census_scvi.publication.hub import trained_cells, write_hub
from census_scvi.publication.platform import METADATA, platform_metadata
from census_scvi.publication.sample import Sample
from census_scvi.publication.sealed import COLUMNS, write_sealed
from census_scvi.workspace.identity import identities

CARD = "README.md"


def write_published(
    folder: Path,
    model: scvi.model.SCVI,
    description: ModelDescription,
    sample: Sample,
    latent: npt.NDArray[np.float32],
    record: dict[str, Any],
) -> None:
    """Write the folder, completely or not at all.

    Parameters
    ----------
    folder
        Path of the folder.
    model, description
        The trained model.
    sample
        The sealed cells, with soma_joinid and batch in obs.
    latent
        float32 (cells, n_latent): their embedding, as published.
    record
        The provenance; the identities of the files and a seal are added to it.
    """
    partial = folder.with_name(folder.name + ".partial")
    remove(partial)
    partial.mkdir()
    save_safe(model, description, partial)
    shown = dict.fromkeys([*COLUMNS, description.labels_key])
    obs = sample.obs[[name for name in shown if name in sample.obs]]
    sample = replace(sample, obs=obs.set_axis(obs["soma_joinid"].astype(str).to_numpy()))
    write_sealed(partial, description, sample, latent)
    hub = write_hub(partial, load_safe(partial)[0], description, sample)
    (partial / PICTURE).write_bytes(learning_curve(record["stages"]["train"]["learning_curves"]))
    card = model_card(record, description, int(trained_cells(sample, description).sum()))
    (partial / CARD).write_text(card, encoding="utf-8")
    metadata = platform_metadata(record, family_of(description.model))
    (partial / METADATA).write_text(metadata, encoding="utf-8")
    files = identities(partial, [WEIGHTS, DESCRIPTION, SEALED, *hub, PICTURE, CARD, METADATA])
    record = {**record, "format": FORMAT, "files": files}
    write_json(partial / PROVENANCE, {**record, "seal": seal_of(record)})
    sync_tree(partial)
    partial.rename(folder)


def copy_to(folder: Path, uri: str, *, replace: bool) -> None:
    """Copy the published folder to another folder or URL.

    On a local disk the folder appears in one step. Elsewhere the provenance is copied last.

    Raises
    ------
    UserError
        The target holds a published model and `replace` is false, it holds anything else, or it is not writable.
    """
    try:
        system, target = file_system(uri)
        if system.exists(f"{target}/{PROVENANCE}"):
            with system.open(f"{target}/{PROVENANCE}", "rb") as file:
                if file.read() == (folder / PROVENANCE).read_bytes():
                    return
        _require_free(system, target, uri, {file.name for file in folder.iterdir()}, replace=replace)
        if (path := local_path(uri)) is not None:
            _copy_local(folder, path)
            return
        names = sorted(file.name for file in folder.iterdir() if file.name != PROVENANCE)
        for name in [*names, PROVENANCE]:
            system.put_file(str(folder / name), f"{target}/{name}")
    except (ImportError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _SAID_ELSEWHERE:
            raise
        raise UserError(f"publish.model_uri {uri} cannot be written: {error}") from None


# Full disk or missing permission: these errors are reported elsewhere, with the same message for every stage.
_SAID_ELSEWHERE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def _require_free(system: AbstractFileSystem, target: str, uri: str, files: set[str], *, replace: bool) -> None:
    """UserError unless the target is empty, or holds a (partial) published model that may be replaced."""
    if not system.exists(target):
        return
    there = [Path(entry).name for entry in system.ls(target, detail=False)] if system.isdir(target) else [target]
    foreign = [] if PROVENANCE in there else sorted(set(there) - files)
    if foreign:
        raise UserError(
            f"publish.model_uri {uri} has no published model, but {foreign[0]!r}; it was not changed: give an empty"
            " or a new folder"
        )
    if there and not replace:
        raise UserError(f"publish.model_uri {uri} has another model; set publish.replace to true to replace it")


def _copy_local(folder: Path, target: Path) -> None:
    partial, aside = (target.with_name(f".{target.name}.census-scvi-{what}") for what in ("partial", "old"))
    if aside.is_dir() and not target.exists():  # killed between the two renames below: restore the old folder
        aside.rename(target)
    for leftover in (partial, aside):
        remove(leftover)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, partial)
    sync_tree(partial)
    if target.exists() and exchange(partial, target):
        aside = partial
    else:
        if target.exists():
            target.rename(aside)
        partial.rename(target)
    sync(target.parent)
    remove(aside)
