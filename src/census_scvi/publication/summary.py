"""The table `scvi_summary` of an Experiment: one row per publication; rows are never changed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pandas as pd
import pyarrow as pa
import tiledbsoma

from census_scvi.census.open import MEASUREMENT
from census_scvi.census.schema import table_platform_config
from census_scvi.census.storage import soma_context
from census_scvi.errors import UserError
from census_scvi.publication.group import make_member, name_member

SUMMARY = "scvi_summary"
_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("publication", pa.large_string()),
        ("embedding_name", pa.large_string()),
        ("embedding_sha256", pa.large_string()),
        ("n_cells", pa.int64()),
        ("n_features", pa.int64()),
        ("published_on", pa.large_string()),
        ("published_by", pa.large_string()),
        ("model_sha256", pa.large_string()),
        ("model_uri", pa.large_string()),
        ("census_uri", pa.large_string()),
        ("census_version", pa.large_string()),
        ("census_schema", pa.large_string()),
        ("census_created_on", pa.large_string()),
        ("census_cells", pa.int64()),
        ("provenance", pa.large_string()),
    ]
)
_MOST_ROWS = 2**31


def read_summary(experiment_uri: str) -> pd.DataFrame:
    """All publications in an Experiment, oldest first; empty if there are none.

    The column `provenance` holds the whole record as JSON.
    """
    with tiledbsoma.Experiment.open(experiment_uri, context=soma_context(experiment_uri)) as experiment:
        measurement = experiment.ms[MEASUREMENT]
        if SUMMARY not in measurement:
            return pd.DataFrame({name: [] for name in _SCHEMA.names})
        return (
            measurement[SUMMARY]
            .read()
            .concat()
            .to_pandas()
            .sort_values(["published_on", "soma_joinid"], ignore_index=True)
        )


def append_summary(experiment_uri: str, row: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Add a publication; an existing row of the same publication is kept unchanged.

    Parameters
    ----------
    experiment_uri
        The Experiment.
    row
        Values by column.
    provenance
        Its full provenance.
    """
    table_uri = _table_uri(experiment_uri)
    present = read_summary(experiment_uri)
    if row["publication"] in set(present["publication"]):
        return
    joinid = _free_joinid(row["publication"], set(present["soma_joinid"]))
    values = {**row, "soma_joinid": joinid, "provenance": json.dumps(provenance, sort_keys=True)}
    if values.keys() != set(_SCHEMA.names):
        raise ValueError(f"a publication has {sorted(_SCHEMA.names)}, not {sorted(values)}")
    with tiledbsoma.DataFrame.open(table_uri, "w", context=soma_context(table_uri)) as table:
        table.write(pa.table({field.name: pa.array([values[field.name]], field.type) for field in _SCHEMA}))
    if row["publication"] not in set(read_summary(experiment_uri)["publication"]):
        raise UserError(f"{table_uri} was overwritten by another publication; run the same command again")


def _free_joinid(publication: str, taken: set[int]) -> int:
    """A soma_joinid from the publication id: with the next free one, two publishers would write the same row."""
    joinid = int.from_bytes(hashlib.sha256(publication.encode()).digest()[:8]) % (_MOST_ROWS - 1)
    while joinid in taken:
        joinid = (joinid + 1) % (_MOST_ROWS - 1)
    return joinid


def provenance_of(experiment_uri: str, publication: str) -> dict[str, Any]:
    """The provenance of a publication; UserError if there is none."""
    rows = read_summary(experiment_uri).set_index("publication")
    if publication not in rows.index:
        raise UserError(f"{experiment_uri}: {SUMMARY} has no publication {publication}")
    return dict(json.loads(str(rows.loc[publication, "provenance"])))


def _table_uri(experiment_uri: str) -> str:
    with tiledbsoma.Experiment.open(experiment_uri, context=soma_context(experiment_uri)) as experiment:
        measurement = experiment.ms[MEASUREMENT]
        if SUMMARY in measurement:
            return str(measurement[SUMMARY].uri)
        uri = measurement.uri
    made = make_member(uri, SUMMARY, tiledbsoma.DataFrame, _create)
    name_member(uri, SUMMARY, SUMMARY, tiledbsoma.DataFrame)
    return made


def _create(uri: str) -> tiledbsoma.DataFrame:
    return tiledbsoma.DataFrame.create(
        uri,
        schema=_SCHEMA,
        index_column_names=["soma_joinid"],
        domain=[(0, _MOST_ROWS - 1)],
        platform_config=table_platform_config(_SCHEMA),
    )
