"""Find the rows of a var that are proteins (features of type Antibody Capture), and their names."""

from __future__ import annotations

import logging
import re

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.census.gene_rows import is_protein

log = logging.getLogger(__name__)

# Columns of var with the names of the features, where the index holds their ids.
_NAME_COLUMNS = ("gene_symbols", "gene_symbol", "feature_name", "gene_names", "gene_name", "name", "symbol")
# Antibodies that mark samples, not proteins.
_HASHTAG = re.compile(r"hash[ _-]?tag|^HTO[ _-]?\d|[ _-]HTO[ _-]?\d*$", re.IGNORECASE)


def find_protein_rows(var: pd.DataFrame) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Rows of proteins, int64 (proteins,), and their names; antibodies of hashtags are excluded, with a log line."""
    rows = np.flatnonzero(is_protein(var))
    names = _names(var, rows)
    hashtags = np.array([bool(_HASHTAG.search(name)) for name in names], bool)
    if hashtags.any():
        first = names[int(np.flatnonzero(hashtags)[0])]
        log.info("%d features of type Antibody Capture are hashtags, not proteins, such as %s", hashtags.sum(), first)
    return rows[~hashtags], [name for name, hashtag in zip(names, hashtags, strict=True) if not hashtag]


def _names(var: pd.DataFrame, rows: npt.NDArray[np.int64]) -> list[str]:
    index = var.index.astype(str)
    named = next((var[column] for column in _NAME_COLUMNS if column in var), None)
    names = []
    for row in rows:
        given = "" if named is None or pd.isna(named.iloc[row]) else str(named.iloc[row])
        names.append(given or _before_made_unique(index[row], index))
    return names


def _before_made_unique(name: str, index: pd.Index) -> str:
    """CD4 for CD4-1, if CD4 is the name of another row: scanpy's `var_names_make_unique` changed it."""
    found = re.fullmatch(r"(.+)-\d+", name)
    return found[1] if found and found[1] in index else name
