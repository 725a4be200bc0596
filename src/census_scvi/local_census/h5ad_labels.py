"""Conversion of a file's obs table to the label columns of the Census."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.census.schema import LABEL_COLUMNS, SETTABLE_COLUMNS, default_label
from census_scvi.config.messages import suggestion
from census_scvi.errors import UserError

log = logging.getLogger(__name__)


def census_labels(
    table: pd.DataFrame,
    *,
    path: Path,
    organism: str,
    columns: Mapping[str, str],
    values: Mapping[str, str | bool],
) -> pd.DataFrame:
    """Label columns of the Census for the cells of a file, from its obs `table` (same rows)."""
    given = {census: table_column(table, name, f"{path}: obs") for census, name in columns.items()}
    own = [name for name in SETTABLE_COLUMNS if name in table and name not in columns and name not in values]
    # Use a term id of the file only with the label of the same file, not with a label from the settings.
    own = [name for name in own if (label := name.removesuffix("_ontology_term_id")) == name or label in own]
    if own:
        log.info("%s: used under their own names: %s", path, ", ".join(own))
    given |= {name: table[name] for name in own}
    # If the general tissue is not given, tissue and its term id are used.
    general = {"tissue_general", "tissue_general_ontology_term_id"}.isdisjoint({*given, *values})
    labels = pd.DataFrame(index=pd.RangeIndex(len(table)))
    for name in LABEL_COLUMNS:
        default = default_label(name, organism)
        if name in values:
            labels[name] = _constant(str(values[name]), len(table))
        elif name in given:
            labels[name] = _label(given[name], default, f"{path}: {name}")
        elif general and name.startswith("tissue_general"):
            labels[name] = labels[name.replace("tissue_general", "tissue")]
        else:
            labels[name] = _constant(default, len(table))
    primary = given.get("is_primary_data", pd.Series(values.get("is_primary_data", True), index=range(len(table))))
    labels["is_primary_data"] = _booleans(primary, f"{path}: is_primary_data")
    if "observation_joinid" in given:
        labels["observation_joinid"] = given["observation_joinid"].map(label_text).to_numpy()
    return labels


def table_column(table: pd.DataFrame, name: str, where: str) -> pd.Series:
    """Column of a file's table, with a default index; UserError with the nearest and all names if it is missing."""
    if name not in table:
        known = [str(column) for column in table.columns]
        raise UserError(
            f"{where} has no column {name!r}{suggestion(name, known)} (it has {', '.join(known) or 'none'})"
        )
    return table[name].reset_index(drop=True)


def _constant(value: str, length: int) -> pd.Series:
    return pd.Series(pd.Categorical.from_codes(np.zeros(length, dtype=np.int8), categories=pd.Index([value])))


def _label(values: pd.Series, default: str, where: str) -> pd.Series:
    """Labels as text; missing and empty labels become the default."""
    codes, found = pd.factorize(values)
    missing = int((codes < 0).sum())
    if missing:
        log.warning("%s: %s cells without a value get %r", where, f"{missing:,}", default)
    # Values that differ only in type (1 and "1") are one label. Code -1 (missing) selects the last entry, the default.
    text = np.array([label_text(value) or default for value in found] + [default], dtype=object)
    label, names = pd.factorize(text)
    return pd.Series(pd.Categorical.from_codes(label[codes], categories=pd.Index(names)))


def label_text(value: object) -> str:
    """Label as text; 1.0 becomes "1", because a missing value converts a column of integers to floats."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _booleans(values: pd.Series, where: str) -> npt.NDArray[Any]:
    meaning: dict[Any, bool] = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    found = values.astype(str).str.lower().map(meaning)
    if found.isna().any():
        wrong = sorted({str(value) for value in values[found.isna().to_numpy()]})[:3]
        raise UserError(f"{where} has {', '.join(wrong)}; expected true or false for every cell")
    return found.to_numpy(dtype=bool)
