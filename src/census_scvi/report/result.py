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
        By embedding.
    breakdowns
        By embedding, then by column: a table of `break_down`.
    problems
        Measurements that failed, and why, for the reader of the report.
    same_as
        Columns that divide the cells as another column does, by name, and the name of that one; only that is measured.
    """

    scores: dict[str, list[Score]] = field(default_factory=dict)
    breakdowns: dict[str, dict[str, pd.DataFrame]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    same_as: dict[str, str] = field(default_factory=dict)
