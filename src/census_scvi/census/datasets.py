"""Datasets that the cells of a Census come from: CELLxGENE datasets, or the sources of a local Census."""

from __future__ import annotations

from typing import Any

import tiledbsoma

from census_scvi.census.open import Census

# Maximum number of datasets to list; `n_datasets` counts all of them.
_MOST_LISTED = 20
_LISTED = ("dataset_id", "dataset_title", "citation", "collection_name", "collection_doi")


def describe_data(census: Census) -> dict[str, Any]:
    """The datasets of the organism's cells.

    Returns
    -------
    `cellxgene`: whether all datasets belong to collections of CELLxGENE Discover; `n_datasets`: their number;
    `datasets`: the first 20, each with its description in the Census, or an empty list if `cellxgene` is true.
    """
    table = census.root["census_info"]["datasets"].read().concat().to_pandas()
    if (used := _used(census)) is not None:
        table = table[table["dataset_id"].isin(used)]
    collections = table["collection_id"].fillna("") if "collection_id" in table else None
    cellxgene = collections is not None and len(table) > 0 and bool((collections != "").all())
    columns = [name for name in _LISTED if name in table]
    listed = [] if cellxgene else table[columns].head(_MOST_LISTED).fillna("").astype(str).to_dict("records")
    return {"cellxgene": cellxgene, "n_datasets": len(table), "datasets": listed}


def _used(census: Census) -> set[str] | None:
    """Ids of the datasets in obs; None if the column dataset_id is absent or not categorical."""
    try:
        values = census.experiment.obs.get_enumeration_values(["dataset_id"])
    except (KeyError, tiledbsoma.SOMAError):
        return None
    return set(values["dataset_id"].to_pylist())
