"""The result of an evaluation, before it is written as a record or drawn as a report."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from census_scvi.metrics.score import Score


@dataclass
class Evaluation:
    """Scores of every embedding.

    Attributes
    ----------
    scores
        Scores by embedding.
    breakdowns
        Tables of `break_down`, by embedding and column.
    problems
        Failed measurements with their reasons, for the report.
    same_as
        Maps a column to another one that groups the cells identically; only the latter is measured.
    """

    scores: dict[str, list[Score]] = field(default_factory=dict)
    breakdowns: dict[str, dict[str, pd.DataFrame]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    same_as: dict[str, str] = field(default_factory=dict)
