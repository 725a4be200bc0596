"""Select cells by a value filter, read obs in chunks, and compute the batch of each cell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import tiledbsoma

from census_scvi.census.open import Census, cannot_be_read, is_damage
from census_scvi.config.messages import shown, suggestion
from census_scvi.config.obs_filter import FilterError, usable_filter
from census_scvi.errors import UserError

_SEPARATOR = "|"


@dataclass(frozen=True)
class Cells:
    """Selected cells, in the order of the Census.

    Attributes
    ----------
    joinids
        int64 (cells,): soma_joinid.
    batch_codes
        int32 (cells,): position in `batches`.
    batches
        Labels of the batches that have cells, sorted.
    """

    joinids: npt.NDArray[np.int64]
    batch_codes: npt.NDArray[np.int32]
    batches: list[str]

    def __len__(self) -> int:
        return len(self.joinids)

    def batch_sizes(self) -> pd.Series:
        """Number of cells per batch, indexed by label."""
        return pd.Series(np.bincount(self.batch_codes, minlength=len(self.batches)), index=self.batches)


def select_cells(
    census: Census, value_filter: str | None, batch_key: list[str], setting: str = "census.obs_query"
) -> Cells:
    """Find the cells of a filter and their batches, in 12 bytes per cell.

    Parameters
    ----------
    census
        The open Census.
    value_filter
        Filter on obs; None: all cells.
    batch_key
        obs columns whose combination is the batch.
    setting
        Setting or argument that contains the filter, for the error.

    Raises
    ------
    UserError
        The filter does not parse, contains an unknown column, or matches no cell; a batch_key column is not in obs.
    """
    require_columns(census, batch_key, "anndata.batch_key")
    joinids: list[npt.NDArray[np.int64]] = []
    codes: list[npt.NDArray[np.int32]] = []
    labels: dict[str, int] = {}
    for table in read_obs(census, value_filter, ["soma_joinid", *batch_key], setting):
        joinids.append(table["soma_joinid"].to_numpy())
        codes.append(_batch_codes(table.select(batch_key).to_pandas().set_axis(range(len(table))), labels))
    cells = np.concatenate(joinids) if joinids else np.empty(0, np.int64)
    if not len(cells):
        if not setting.startswith("census."):
            raise _matches_none(census, value_filter, setting)
        raise UserError(
            f"no cell of {census.identity['uri']} ({census.identity['organism']}) matches {value_filter!r};"
            " change census.obs_query, census.obs_query_model or hvg.min_genes"
        )
    return _in_order(cells, np.concatenate(codes), labels)


def select_labels(
    census: Census, cells: Cells, value_filter: str | None, column: str, unlabeled_category: str
) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Labels of cells.

    Parameters
    ----------
    census
        The open Census.
    cells
        The cells.
    value_filter
        A filter that they match, so that other cells are not read.
    column
        obs column of the labels.
    unlabeled_category
        Label of the cells without a known label; missing values get it, too.

    Returns
    -------
    Codes, int32 (cells,), and the labels in the order of the codes: sorted, the unlabelled category last.
    """
    require_columns(census, [column], "anndata.labels_key")
    codes = np.full(len(cells), -1, np.int32)
    known: dict[str, int] = {}
    for table in read_obs(census, value_filter, ["soma_joinid", column], "census.obs_query"):
        joinids = table["soma_joinid"].to_numpy()
        places = np.minimum(np.searchsorted(cells.joinids, joinids), len(cells) - 1)
        wanted = cells.joinids[places] == joinids
        found = pd.Categorical(table[column].to_pandas())
        of_category = [known.setdefault(str(label), len(known)) for label in found.categories]
        coded = np.array([*of_category, -1], np.int32)[found.codes]  # the code of a missing value is -1
        codes[places[wanted]] = coded[wanted]
    used, places = np.unique(codes, return_inverse=True)
    names = [unlabeled_category if code < 0 else list(known)[code] for code in used]
    labels = [*sorted(set(names) - {unlabeled_category}), unlabeled_category]
    return np.array([labels.index(name) for name in names], np.int32)[places], labels


def matching_joinids(census: Census, obs_filter: str | None, setting: str = "obs_filter") -> npt.NDArray[np.int64]:
    """soma_joinids of the cells that match a filter, ascending; UserError if there are none."""
    tables = [table["soma_joinid"].to_numpy() for table in read_obs(census, obs_filter, ["soma_joinid"], setting)]
    joinids = np.sort(np.concatenate([np.empty(0, np.int64), *tables]))
    if not len(joinids):
        raise _matches_none(census, obs_filter, setting)
    return joinids


def _matches_none(census: Census, value_filter: str | None, setting: str) -> FilterError:
    where = f"{census.identity['uri']} ({census.identity['organism']})"
    return FilterError(f"{setting} {shown(value_filter)} matches no cell of {where}; change it")


def require_columns(census: Census, columns: list[str], setting: str) -> None:
    """UserError if a column is not in obs (suggests the most similar one), is soma_joinid, or is listed twice."""
    known = [name for name in census.experiment.obs.schema.names if name != "soma_joinid"]
    for column in columns:
        if column == "soma_joinid":
            raise UserError(
                f"{setting} contains 'soma_joinid', the number of a cell; use obs columns of labels or values"
            )
        if column not in known:
            raise UserError(
                f"{setting} contains {column!r}, which is not an obs column of the Census{suggestion(column, known)}"
            )
        if columns.count(column) > 1:
            raise UserError(f"{setting} contains {column!r} twice; remove one")


def soma_filter(census: Census, value_filter: str | None, setting: str) -> str | None:
    """Rewrite a value filter so that TileDB-SOMA evaluates it correctly; UserError if it cannot be used on obs."""
    if value_filter is None:
        return None
    return usable_filter(value_filter, census.experiment.obs.schema, setting)


def read_obs(
    census: Census, value_filter: str | None, columns: list[str], setting: str = "obs_filter"
) -> Iterator[pa.Table]:
    """Columns of obs, in chunks; UserError if the filter cannot be used or obs cannot be read."""
    checked = soma_filter(census, value_filter, setting)
    try:
        yield from census.experiment.obs.read(value_filter=checked, column_names=columns)
    except tiledbsoma.SOMAError as error:
        if value_filter is None or is_damage(error):
            raise cannot_be_read(census.experiment.obs.uri, error) from None
        reason = str(error).strip().partition("\n")[0].removeprefix("SOMAError: ")
        raise FilterError(f"{setting} {shown(value_filter)} cannot be used on obs: {reason}") from None


def batch_label(values: tuple[Any, ...]) -> str:
    r"""One label for a combination of values; different combinations have different labels.

    The separator is escaped within values: ("a|b", "c") is `a\\|b|c`, ("a", "b|c") is `a|b\\|c`.
    """
    escaped = (str(value).replace("\\", "\\\\").replace(_SEPARATOR, "\\" + _SEPARATOR) for value in values)
    return _SEPARATOR.join(escaped)


def _batch_codes(frame: pd.DataFrame, labels: dict[str, int]) -> npt.NDArray[np.int32]:
    """Batch code of each row; new labels are added to `labels`. Without columns, all rows are one batch."""
    if not len(frame.columns):
        return np.full(len(frame), labels.setdefault("", 0), dtype=np.int32)
    groups = frame.groupby(list(frame.columns), observed=True, sort=False, dropna=False)
    local = groups.ngroup().to_numpy()
    first_rows = np.unique(local, return_index=True)[1]
    combinations = frame.iloc[first_rows].astype(object).itertuples(index=False, name=None)
    codes = [labels.setdefault(batch_label(values), len(labels)) for values in combinations]
    return np.asarray(codes, dtype=np.int32)[local]


def _in_order(joinids: npt.NDArray[np.int64], codes: npt.NDArray[np.int32], labels: dict[str, int]) -> Cells:
    """Cells sorted by soma_joinid, with codes of the sorted labels."""
    if np.any(joinids[1:] <= joinids[:-1]):
        order = np.argsort(joinids, kind="stable")
        joinids, codes = joinids[order], codes[order]
    batches = sorted(labels)
    rank = np.empty(len(batches), dtype=np.int32)
    rank[[labels[label] for label in batches]] = np.arange(len(batches), dtype=np.int32)
    return Cells(joinids, rank[codes], batches)
