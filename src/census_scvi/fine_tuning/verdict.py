"""Which way to renew a model its measurements recommend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

KEEP, CONTINUED, OF_NEW_BATCHES, RETRAINED = "keep", "continue", "new_batches", "retrain"
# From the cheapest to the dearest.
WAYS = (KEEP, OF_NEW_BATCHES, CONTINUED, RETRAINED)
_TITLES = {
    KEEP: "Keep the model as it is",
    OF_NEW_BATCHES: "Fine-tune with mode new_batches",
    CONTINUED: "Fine-tune with mode continue",
    RETRAINED: "Train the model again",
}
# A difference of accuracy counts if it is above this and above two standard errors; one of a mean score above this.
LEAST, ERRORS = 0.01, 2.0
LEAST_SCORE = 0.02
# Relative difference of an ELBO that counts.
LEAST_ELBO = 0.01

Row = Mapping[str, Any]


def recommend(rows: Mapping[str, Row]) -> list[str]:
    """The recommendation in one sentence, and one sentence on each way that was measured.

    The cheapest way is the starting point. A dearer one replaces it if it is better on new cells and not worse on any
    other count: `differences` says what counts.

    Parameters
    ----------
    rows
        Row of each way by name, as `compared` gives them, with `bio` and `batch`.
    """
    chosen = KEEP
    reasons = []
    for way in WAYS[1:]:
        if way not in rows:
            continue
        better, worse = differences(rows[way], rows[chosen])
        says = f"{_TITLES[way]}, instead of {chosen}:"
        if better and not worse:
            reasons.append(f"{says} better ({'; '.join(better)}), nothing worse.")
            chosen = way
        elif worse:
            reasons.append(
                f"{says} worse ({'; '.join(worse)}){' and better (' + '; '.join(better) + ')' if better else ''}."
            )
        else:
            reasons.append(f"{says} no difference that counts.")
    return [f"{_TITLES[chosen]}.", *reasons]


def differences(row: Row, before: Row) -> tuple[list[str], list[str]]:
    """What counts as better, and as worse, in a row compared with another one: sentences without verb.

    - label transfer to new donors: by more than 0.01 and two standard errors;
    - mean score of biology, or of batches: by more than 0.02;
    - ELBO of the cells that the model has seen: higher by more than 1 % is worse;
    - without known labels, ELBO of the new cells: by more than 1 %.
    """
    better: list[str] = []
    worse: list[str] = []

    def count(name: str, gain: float, least: float, words: str) -> None:
        if math.isfinite(gain) and abs(gain) > least:
            (better if gain > 0 else worse).append(f"{name} {words}")

    gain = row["transfer"] - before["transfer"]
    error = max(row["transfer_error"], before["transfer_error"]) if math.isfinite(gain) else 0.0
    count("label transfer", gain, max(LEAST, ERRORS * error), f"{row['transfer']:.3f}, was {before['transfer']:.3f}")
    for name, title in (("bio", "biology"), ("batch", "batch mixing")):
        count(title, row[name] - before[name], LEAST_SCORE, f"{row[name]:.3f}, was {before[name]:.3f}")
    old = (before["elbo_old"] - row["elbo_old"]) / abs(before["elbo_old"])
    if old < 0:
        count("ELBO of old cells", old, LEAST_ELBO, f"{row['elbo_old']:.1f}, was {before['elbo_old']:.1f}")
    if not math.isfinite(gain):
        new = (before["elbo_new"] - row["elbo_new"]) / abs(before["elbo_new"])
        count("ELBO of new cells", new, LEAST_ELBO, f"{row['elbo_new']:.1f}, was {before['elbo_new']:.1f}")
    return better, worse
