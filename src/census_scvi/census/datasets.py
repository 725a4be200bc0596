"""Source of the cells of a Census: datasets of CELLxGENE, or the datasets from which a local Census was built."""

from __future__ import annotations

from typing import Any

import tiledbsoma

from census_scvi.census.open import Census

# Data sets that are listed by name; of more, how many there are.
_MOST_LISTED = 20
_LISTED = ("dataset_id", "dataset_title", "citation", "collection_name", "collection_doi")


def describe_data(census: Census) -> dict[str, Any]:
    """The datasets of the organism's cells.

    Returns
    -------
    `cellxgene`: whether all are collections of CELLxGENE Discover; `n_datasets`; `datasets`: the first of them, each
    with its description in the Census.
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
    """Ids of the datasets in obs; None if they are not categories."""
    try:
        values = census.experiment.obs.get_enumeration_values(["dataset_id"])
    except (KeyError, tiledbsoma.SOMAError):
        return None
    return set(values["dataset_id"].to_pylist())
