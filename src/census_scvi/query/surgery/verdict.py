"""What a comparison of ways to map a query says, in sentences that follow from its table."""

from __future__ import annotations

import pandas as pd

from census_scvi.metrics.agreement import CLASSIFIERS
from census_scvi.query.surgery.settings import JOINT

NO_SURGERY = "no surgery"
EQUAL_EPOCHS, EQUAL_STEPS = "per batch, equal epochs", "per batch, equal steps"
FORWARD, BACKWARD = "sequential", "sequential, reverse order"
_SEED = "joint, seed "
# A difference of accuracy counts if it is this many standard errors, besides being larger than between seeds.
_ERRORS = 2.0
# Part by which a distance may exceed the largest one between seeds, and still be no difference: distances of seeds from
# the first joint training differ by up to this part themselves (docs/surgery.md).
_TOLERANCE = 0.25
_TITLES = {"mlp": "perceptron"}


def seed_name(seed: int) -> str:
    """Name of the joint training with another seed."""
    return f"{_SEED}{seed}"


def verdict(table: pd.DataFrame) -> list[str]:
    """Sentences on a table of `compare_ways`; the first one is the recommendation.

    Ways are compared with joint training and its other seeds. A distance counts if it is a quarter larger than that
    between seeds. An accuracy counts if it is outside the range of all joint trainings by more than the range is wide,
    and more than two standard errors from their mean, for most of the classifiers and with one sign: each way is
    trained once, and is one draw of its own seed.
    """
    if JOINT not in table.index:
        return ["Surgery cannot change the embedding of this query: map it without surgery."]
    others = [name for name in (EQUAL_EPOCHS, EQUAL_STEPS, FORWARD, BACKWARD) if name in table.index]
    gains = {name: _gain(table, name) for name in (NO_SURGERY, *others)}
    found = [_positions(table, name) for name in others]
    found.append(_length(table))
    found += [_accuracy(table, name, gain) for name, gain in gains.items()]
    found += [_mixing(table), _reference(table)]
    return [_recommendation(table, gains, others), *filter(None, found)]


def _recommendation(table: pd.DataFrame, gains: dict[str, float], others: list[str]) -> str:
    best = max(gains, key=lambda name: gains[name])
    if gains[best] > 0:
        what = "Map without surgery" if best == NO_SURGERY else f"Use “{best}”"
        return f"{what}: its labels are more accurate than those of all joint trainings, by more than seeds differ."
    known = _knows_labels(table)
    words = f"Train all batches jointly: {_why_joint(table, gains, others, known=known)}"
    if not known:
        return words
    if gains[NO_SURGERY] < 0:
        return f"{words} Without surgery the labels are less accurate."
    return f"{words} For labels, surgery is not needed: without it they are not less accurate beyond seeds."


def _why_joint(table: pd.DataFrame, gains: dict[str, float], others: list[str], *, known: bool) -> str:
    if not others:
        return "for this query and model it is the only way."
    if not any(_differs(table, name) or gains[name] for name in others):
        return "no difference beyond seeds between the ways of training, and this is one training."
    if known:
        return "the labels of no other way of training are more accurate beyond seeds."
    return "other ways give other positions, and without known labels of the query none can be called better."


def _knows_labels(table: pd.DataFrame) -> bool:
    return any(name.startswith("accuracy_") for name in table.columns)


def _seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Joint trainings with other seeds."""
    return table[table.index.str.startswith(_SEED)]


def _joint(table: pd.DataFrame, classifier: str) -> pd.Series:
    """Accuracies of all joint trainings."""
    trained = (table.index == JOINT) | table.index.str.startswith(_SEED)
    return table.loc[trained, f"accuracy_{classifier}"].astype(float)


def _differs(table: pd.DataFrame, name: str) -> bool:
    noise = float(_seeds(table)["distance_mean"].max())
    return bool(table.loc[name, "distance_mean"] > (1 + _TOLERANCE) * noise)


def _positions(table: pd.DataFrame, name: str) -> str:
    """How far the positions of a way are from those of joint training."""
    row, seeds = table.loc[name], _seeds(table)
    noise = float(seeds["distance_mean"].max())
    says = "no difference beyond seeds"
    if _differs(table, name):
        says = f"{row['distance_mean'] / noise:.1f} times the distance between seeds"
    return (
        f"“{name}”: {says}. Mean distance {row['distance_mean']:.3g} (seeds: up to {noise:.3g}),"
        f" {row['neighbor_overlap']:.0%} of the neighbors in common"
        f" (seeds: {seeds['neighbor_overlap'].min():.0%} or more)."
    )


def _length(table: pd.DataFrame) -> str:
    if EQUAL_STEPS not in table.index:
        return ""
    if _differs(table, EQUAL_STEPS) and not _differs(table, EQUAL_EPOCHS):
        return "Training per batch differs only where it is longer: the number of steps matters, not the grouping."
    return ""


def _gain(table: pd.DataFrame, name: str) -> float:
    """Mean gain of accuracy over the classifiers for which it counts, if these are most of them and agree; else 0."""
    if not _knows_labels(table):
        return 0.0
    gains = [_counted_gain(table, name, classifier) for classifier in CLASSIFIERS]
    counted = [gain for gain in gains if gain]
    if 2 * len(counted) <= len(gains) or min(counted) < 0 < max(counted):
        return 0.0
    return sum(counted) / len(counted)


def _counted_gain(table: pd.DataFrame, name: str, classifier: str) -> float:
    """Accuracy minus the mean of all joint trainings, if the difference counts; else 0."""
    joint, accuracy = _joint(table, classifier), float(table.loc[name, f"accuracy_{classifier}"])
    least, most = float(joint.min()), float(joint.max())
    gain = accuracy - float(joint.mean())
    outside = max(least - accuracy, accuracy - most)
    error = _ERRORS * float(table.loc[name, f"gain_error_{classifier}"])
    return gain if outside > most - least and abs(gain) > error else 0.0


def _accuracy(table: pd.DataFrame, name: str, gain: float) -> str:
    """The accuracies of a way and of the joint trainings, if they differ; those without surgery always."""
    if not _knows_labels(table) or not (gain or name == NO_SURGERY):
        return ""
    numbers = []
    for classifier in CLASSIFIERS:
        joint, accuracy = _joint(table, classifier), table.loc[name, f"accuracy_{classifier}"]
        title = _TITLES.get(classifier, classifier.replace("_", " "))
        all_joint = " to ".join(dict.fromkeys([f"{joint.min():.3f}", f"{joint.max():.3f}"]))
        numbers.append(f"{accuracy:.3f} against {all_joint} ({title})")
    says = "no difference beyond seeds in the accuracy of labels"
    if gain:
        says = f"labels are {'more' if gain > 0 else 'less'} accurate than after joint training"
    return f"“{name}”: {says}: {', '.join(numbers)}."


def _mixing(table: pd.DataFrame) -> str:
    if "mixing" not in table or table["mixing"].isna().any():
        return ""
    least, most = table["mixing"].min(), table["mixing"].max()
    without, joint = (float(table.loc[name, "mixing"]) for name in (NO_SURGERY, JOINT))
    return (
        f"Mixing with the reference within types (1: as shuffled): {without:.2f} without surgery, {joint:.2f} after"
        f" joint training; {least:.2f} to {most:.2f} over all ways."
    )


def _reference(table: pd.DataFrame) -> str:
    moved, apart = (float(table[name].max()) for name in ("moved", "batch_by_batch"))
    return (
        f"The reference did not move ({_change(moved)} of its latent), and it does not matter whether cells are"
        f" embedded together or batch by batch ({_change(apart)})."
    )


def _change(largest: float) -> str:
    return f"largest change {largest:.1g}" if largest else "no change"
