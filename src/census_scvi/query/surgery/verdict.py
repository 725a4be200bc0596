"""What a comparison of ways to map a query says, in sentences that follow from its table."""

from __future__ import annotations

import math

import pandas as pd

from census_scvi.metrics.agreement import CLASSIFIERS
from census_scvi.query.surgery.settings import JOINT

NO_SURGERY = "no surgery"
EQUAL_EPOCHS, EQUAL_STEPS = "per batch, equal epochs", "per batch, equal steps"
FORWARD, BACKWARD = "sequential", "sequential, reverse order"
_SEED = "joint, seed "
# A difference of accuracy counts if it is this many standard errors, and larger than between seeds.
_ERRORS = 2.0
# Part by which a distance may exceed the largest one between seeds, and still be no difference.
_TOLERANCE = 0.1


def seed_name(seed: int) -> str:
    """Name of the joint training with another seed."""
    return f"{_SEED}{seed}"


def verdict(table: pd.DataFrame) -> list[str]:
    """Sentences on a table of `compare_ways`; the first one is the recommendation.

    Ways are compared with joint training. A difference counts if it is larger than that between seeds of joint
    training; one of accuracy also has to be larger than two standard errors, for most of the classifiers.
    """
    if JOINT not in table.index:
        return ["Surgery cannot change the embedding of this query: map it without surgery."]
    seeds = table[table.index.str.startswith(_SEED)]
    others = [name for name in (EQUAL_EPOCHS, EQUAL_STEPS, FORWARD, BACKWARD) if name in table.index]
    gains = {name: _gain(table.loc[name], seeds) for name in (NO_SURGERY, *others)}
    found = [_positions(name, table.loc[name], seeds) for name in others]
    found.append(_length(table, seeds))
    found += [_accuracy(name, gain, table) for name, gain in gains.items()]
    found += [_mixing(table), _reference(table)]
    return [_recommendation(gains, others, known=_knows_labels(table)), *filter(None, found)]


def _recommendation(gains: dict[str, float], others: list[str], *, known: bool) -> str:
    best = max(others, key=lambda name: gains[name], default=JOINT)
    if gains.get(best, 0.0) > 0:
        return f"Use “{best}”: its labels are more accurate than those of joint training, by more than seeds differ."
    if gains[NO_SURGERY] > 0:
        return "Map without surgery: its labels are more accurate than those after surgery."
    words = (
        "Train all batches jointly: no other way of training is better beyond seeds."
        if others
        else "Train the batch: with one batch there is only this way."
    )
    if not known:
        return f"{words} Without known labels of the query, this is about positions only."
    if gains[NO_SURGERY] < 0:
        return f"{words} Without surgery the labels are less accurate."
    return f"{words} For labels, surgery is not needed: without it they are as accurate."


def _knows_labels(table: pd.DataFrame) -> bool:
    return any(name.startswith("accuracy_") for name in table.columns)


def _differs(row: pd.Series, seeds: pd.DataFrame) -> bool:
    return bool(row["distance_mean"] > (1 + _TOLERANCE) * seeds["distance_mean"].max())


def _positions(name: str, row: pd.Series, seeds: pd.DataFrame) -> str:
    """How far the positions of a way are from those of joint training."""
    if seeds.empty:
        return ""
    noise = float(seeds["distance_mean"].max())
    says = f"{row['distance_mean'] / noise:.1f} times the distance between seeds"
    if not _differs(row, seeds):
        says = "no difference beyond seeds"
    return (
        f"“{name}”: {says}. Mean distance {row['distance_mean']:.3g} (seeds: up to {noise:.3g}),"
        f" {row['neighbor_overlap']:.0%} of the neighbors in common"
        f" (seeds: {seeds['neighbor_overlap'].min():.0%} or more)."
    )


def _length(table: pd.DataFrame, seeds: pd.DataFrame) -> str:
    if EQUAL_STEPS not in table.index or seeds.empty:
        return ""
    if _differs(table.loc[EQUAL_STEPS], seeds) and not _differs(table.loc[EQUAL_EPOCHS], seeds):
        return "Training per batch differs only where it is longer: the number of steps matters, not the grouping."
    return ""


def _gain(row: pd.Series, seeds: pd.DataFrame) -> float:
    """Mean gain of accuracy over the classifiers for which it counts, if that is most of them; else 0."""
    counted, n_measured = [], 0
    for classifier in CLASSIFIERS:
        gain = float(row.get(f"gain_{classifier}", math.nan))
        if math.isnan(gain):
            continue
        n_measured += 1
        noise = float(seeds[f"gain_{classifier}"].abs().max()) if len(seeds) else 0.0
        if abs(gain) > max(_ERRORS * float(row[f"gain_error_{classifier}"]), noise):
            counted.append(gain)
    if 2 * len(counted) <= n_measured or min(counted) < 0 < max(counted):
        return 0.0
    return sum(counted) / len(counted)


def _accuracy(name: str, gain: float, table: pd.DataFrame) -> str:
    if not gain:
        return ""
    numbers = ", ".join(
        f"{table.loc[name, f'accuracy_{classifier}']:.3f} against {table.loc[JOINT, f'accuracy_{classifier}']:.3f}"
        f" ({classifier.replace('_', ' ')})"
        for classifier in CLASSIFIERS
    )
    return f"“{name}”: labels are {'more' if gain > 0 else 'less'} accurate than after joint training: {numbers}."


def _mixing(table: pd.DataFrame) -> str:
    if "mixing" not in table or NO_SURGERY not in table.index or table["mixing"].isna().any():
        return ""
    least, most = table["mixing"].min(), table["mixing"].max()
    without, joint = (float(table.loc[name, "mixing"]) for name in (NO_SURGERY, JOINT))
    return (
        f"Mixing with the reference within types (1: as shuffled): {without:.2f} without surgery, {joint:.2f} after"
        f" joint training; {least:.2f} to {most:.2f} over all ways."
    )


def _reference(table: pd.DataFrame) -> str:
    return (
        f"The reference did not move (largest change of its latent {table['moved'].max():.1g}), and embedding batch by"
        f" batch instead of together changes no coordinate by more than {table['batch_by_batch'].max():.1g}."
    )
