"""The cells that a model has seen: those that it, and the models that it was fine-tuned from, were trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata.io import read_elem

from census_scvi.census.cell_keys import cell_keys, key_columns
from census_scvi.census.cells import read_obs
from census_scvi.census.open import Census, open_census
from census_scvi.census.settings import CensusSection
from census_scvi.config.renamed import translate_recorded_config
from census_scvi.config.run_names import MANIFEST, SEEN_CELLS
from census_scvi.counts.h5ad import open_file
from census_scvi.errors import UserError
from census_scvi.files.place import resolved
from census_scvi.files.uri import without_credentials
from census_scvi.model.published import fetch, read_provenance
from census_scvi.model.safe import read_description
from census_scvi.model.source import Kind, Source
from census_scvi.workspace import Workspace

log = logging.getLogger(__name__)

Keys = npt.NDArray[np.uint64]
# In a record of `ModelDescription.lineage`: Census and filter of the cells that the earlier model was trained on.
LINEAGE_CELLS = "cells_of_model"


def seen_cells(place: str, settings: CensusSection) -> tuple[Keys, list[dict[str, Any]]]:
    """Keys of all cells that a model was trained on.

    Parameters
    ----------
    place
        Run directory, published folder or its URL.
    settings
        The section `census`; its `tiledb` settings are used to open an earlier Census.

    Returns
    -------
    Keys, uint64 (cells,), ascending and unique (see `cell_keys`), and where these cells are from: for each training,
    `uri`, `version` and `organism` of its Census, and the filter.

    Raises
    ------
    UserError
        Nothing says which cells these are, or the Census that they are from cannot be read.
    """
    source = Source.at(place)
    if (run := run_of(source)) is not None:
        return _of_run(run, place, settings)
    if not source.is_published:
        raise UserError(
            f"fine_tune.model {without_credentials(place)} does not say which cells it was trained on; give its run"
            " directory, or the folder that scvi-publish.py wrote"
        )
    folder = fetch(place)
    record = read_provenance(folder)
    origin = {**record["census"], "uri": resolved(record["census"]["uri"], folder)}
    origins = _origins(origin, record["config"], folder)
    return _of_censuses(origins, place, settings), origins


def run_of(source: Source) -> Path | None:
    """The run directory of a model, also if the model in it is given."""
    if source.kind is Kind.MODEL and source.path is not None and (source.path.parent / MANIFEST).exists():
        return source.path.parent
    return source.run


def _of_run(run: Path, place: str, settings: CensusSection) -> tuple[Keys, list[dict[str, Any]]]:
    workspace = Workspace(run)
    record, trained = workspace.whole_record("prepare"), workspace.whole_record("train")
    if record is None or trained is None:
        raise UserError(
            f"fine_tune.model {place} has no trained model with its prepared cells; give a finished run directory"
        )
    origins = _origins(record["census"], record["config"], run / trained["artifacts"][0])
    if SEEN_CELLS in record["outputs"]:
        workspace.check("prepare", [SEEN_CELLS])
        return np.load(run / SEEN_CELLS), origins
    prepared = next(run / name for name in record["artifacts"] if str(name).endswith(".h5ad"))
    keys = prepared_keys(prepared)
    return (_of_censuses(origins, place, settings) if keys is None else np.unique(keys)), origins


def _origins(census: dict[str, Any], config: dict[str, Any], model: Path) -> list[dict[str, Any]]:
    """Census and filter of each training of a model: those of its lineage, then its own."""
    values = translate_recorded_config(config)
    own = {name: census[name] for name in ("uri", "version", "organism")} | {"filter": _training_filter(values)}
    earlier = [each for record in read_description(model).lineage for each in record.get(LINEAGE_CELLS, [])]
    return [*earlier, own]


def _training_filter(config: dict[str, Any]) -> str | None:
    """The value filter of the training cells in a recorded config."""
    census, least = config.get("census", {}), config.get("hvg", {}).get("min_genes")
    parts = [census.get("obs_query"), census.get("obs_query_model"), f"nnz >= {least}" if least else None]
    return " and ".join(f"({part})" for part in parts if part) or None


def prepared_keys(path: Path) -> Keys | None:
    """Keys of prepared cells, in their order in the file; None if the file is gone, or lacks the columns."""
    if not path.exists():
        return None
    with open_file(path) as file:
        names = [name for name in file["obs"] if name in _KEY_COLUMNS]
        if "dataset_id" not in names or "observation_joinid" not in names:
            return None
        return cell_keys(pd.DataFrame({name: read_elem(file[f"obs/{name}"]) for name in names}))


_KEY_COLUMNS = ("dataset_id", "observation_joinid", "raw_sum", "nnz", "raw_variance_nnz")


def _of_censuses(origins: Iterable[dict[str, Any]], place: str, settings: CensusSection) -> Keys:
    found = [np.empty(0, np.uint64)]
    for origin in origins:
        where = {"uri": origin["uri"], "version": origin["version"] or "stable", "organism": origin["organism"]}
        log.info("reading which cells the model was trained on: %s", origin["uri"] or origin["version"])
        try:
            with open_census(settings.model_copy(update=where)) as census:
                found.append(census_keys(census, origin["filter"])[1])
        except UserError as error:
            raise UserError(
                f"the cells that {without_credentials(place)} was trained on are not known, because their Census cannot"
                f" be read ({error}); give fine_tune.model the run directory with its prepared cells"
            ) from None
    return np.unique(np.concatenate(found))


def census_keys(census: Census, value_filter: str | None) -> tuple[npt.NDArray[np.int64], Keys]:
    """soma_joinids, int64 (cells,), ascending, and keys, uint64 (cells,), of the cells of a filter."""
    joinids, keys = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    columns = key_columns(census)
    for table in read_obs(census, value_filter, ["soma_joinid", *columns], "census.obs_query"):
        joinids.append(table["soma_joinid"].to_numpy())
        keys.append(cell_keys(table.select(columns).to_pandas()))
    ids, found = np.concatenate(joinids), np.concatenate(keys)
    order = np.argsort(ids, kind="stable")
    return ids[order], found[order]
