"""Labels of cells as a user gives them: which cells have one, and which labels can be learned from."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.config.messages import suggestion
from census_scvi.errors import UserError

log = logging.getLogger(__name__)

UNLABELLED = "Unlabeled"  # as scNym marks cells without a label
# Values that say that the label is not known, in lower case.
_NO_LABEL = {"", "unlabeled", "unlabelled", "unknown", "unassigned", "na", "n/a", "nan", "none", "null"}
# Numbers with more different values than this are measurements, not names of clusters.
_MOST_NUMBERS = 200
_SHOWN = 5

Labels = npt.NDArray[np.object_]


def column_of(obs: pd.DataFrame, column: str, name: str, setting: str) -> pd.Series:
    """A column of obs; UserError, with the setting that names it, if obs does not have it."""
    if column not in obs:
        columns = [str(each) for each in obs]
        have = ", ".join(columns[:10]) or "no columns"
        raise UserError(f"{name} has no obs column {column!r} ({setting}){suggestion(column, columns)}; obs has {have}")
    return obs[column]


def read_labels(values: pd.Series, where: str) -> Labels:
    """Labels as text, object (cells,); None for cells without one: missing values, "Unlabeled", "unknown" and the like.

    Parameters
    ----------
    values
        Column of obs. Whole numbers are names of clusters.
    where
        Place of the column, for messages.

    Raises
    ------
    UserError
        The values are measured numbers.
    """
    known = values.dropna()
    if isinstance(values.dtype, pd.CategoricalDtype):
        known = known.astype(values.dtype.categories.dtype)
    if pd.api.types.is_numeric_dtype(known) and not pd.api.types.is_bool_dtype(known) and len(known):
        fractions = known[known.astype(float) % 1 != 0]
        if len(fractions) or known.nunique() > _MOST_NUMBERS:
            example = fractions.iloc[0] if len(fractions) else known.iloc[0]
            raise UserError(
                f"{where} holds {known.nunique():,} different numbers such as {example:g}; expected labels, such as"
                " names"
                " of cell types"
            )
        known = known.astype(np.int64)
        log.warning("%s holds numbers (%s): they are used as names", where, _listed(sorted(known.unique())))
    text = known.astype(str).str.strip()
    given = ~text.str.lower().isin(_NO_LABEL).to_numpy()
    found = np.full(len(values), None, dtype=object)
    found[np.flatnonzero(values.notna().to_numpy())[given]] = text.to_numpy(dtype=object)[given]
    return found


def coded(labels: Labels) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Code of each cell's label, -1 for None, and the names, sorted."""
    codes, names = pd.factorize(labels, sort=True)
    return codes.astype(np.int64), [str(name) for name in names]


def require_types(codes: npt.NDArray[np.integer], names: list[str], name: str, column: str) -> npt.NDArray[np.int64]:
    """Cells to learn from, int64 (used cells,): those with a label that several cells have.

    Parameters
    ----------
    codes, names
        (cells,): position of each cell's label in `names`; -1: none.
    name, column
        The cells and their column, for messages.

    Raises
    ------
    UserError
        No cell has a label, or fewer than two labels have several cells.
    """
    labelled = codes >= 0
    if not labelled.any():
        raise UserError(f"{name}: none of {len(codes):,} cells has a label in {column}; nothing can be learned from it")
    if missing := int((~labelled).sum()):
        log.info("%s: %s of %s cells have no label in %s", name, f"{missing:,}", f"{len(codes):,}", column)
    numbers = np.bincount(codes[labelled], minlength=len(names))
    present = [(label, number) for label, number in zip(names, numbers.tolist(), strict=True) if number]
    rare = [label for label, number in present if number == 1]
    if len(present) - len(rare) < 2:
        found = ", ".join(f"{label} ({number:,})" for label, number in present[:_SHOWN])
        raise UserError(
            f"{name}: {column} has {len(present)} label{'s' * (len(present) != 1)}, {len(present) - len(rare)} of them"
            f" with more than one cell ({found}); at least two labels with several cells are needed"
        )
    if rare:
        log.warning(
            "%s: %d of %d labels have one cell and are not used: %s", name, len(rare), len(present), _listed(rare)
        )
    return np.flatnonzero(labelled & (numbers[codes] > 1))


def warn_of_single_studies(labels: Labels, studies: Labels, name: str, column: str) -> str:
    """A sentence on labels that occur in one of several studies, which is also logged; "" if there are none.

    Parameters
    ----------
    labels, studies
        object (cells,): label of each cell, None if it has none, and its study.
    name, column
        Names of both, for the sentence.
    """
    pairs = pd.DataFrame({"label": labels, "study": studies.astype(str)}).dropna().drop_duplicates()
    if pairs["study"].nunique() < 2:
        return ""
    counts = pairs["label"].value_counts()
    alone = sorted(counts.index[counts == 1])
    if not alone:
        return ""
    text = (
        f"{len(alone)} of {len(counts)} labels of {name} occur in one {column} of the reference only, so their"
        f" accuracy in another one is not known: {_listed(alone)}"
    )
    log.warning("%s", text)
    return text


def _listed(names: list[str] | npt.NDArray[np.generic]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(str(name) for name in names[:_SHOWN]) + more
