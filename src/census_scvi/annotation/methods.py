"""The methods of annotation by name: single annotators, and recipes that combine several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from census_scvi.annotation.annotators.harmony import Harmony
from census_scvi.annotation.annotators.joint import Joint
from census_scvi.annotation.annotators.joint_model import STEPS
from census_scvi.annotation.annotators.linear_svm import LinearSvm
from census_scvi.annotation.annotators.logistic_regression import LogisticRegression
from census_scvi.annotation.annotators.neighbor_vote import NEIGHBORS
from census_scvi.annotation.annotators.neighbors import Neighbors
from census_scvi.annotation.annotators.pca import Pca
from census_scvi.annotation.annotators.random_forest import RandomForest
from census_scvi.annotation.annotators.scanvi import Scanvi
from census_scvi.annotation.annotators.scnym import ScNym
from census_scvi.annotation.protocol import Annotator
from census_scvi.config.messages import suggestion
from census_scvi.errors import UserError

CONSENSUS, FAST = "consensus", "fast"
EMBEDDED = Neighbors.name  # the method that needs an embedding instead of counts
MODEL = "model"  # the classifier of a SCANVI model, which needs no labelled cells (`own_labels`)
_CLASSES: dict[str, Any] = {
    Neighbors.name: Neighbors,
    Pca.name: Pca,
    Harmony.name: Harmony,
    Joint.name: Joint,
    LogisticRegression.name: LogisticRegression,
    LinearSvm.name: LinearSvm,
    RandomForest.name: RandomForest,
    Scanvi.name: Scanvi,
    ScNym.name: ScNym,
}
TITLES = {
    CONSENSUS: "consensus",
    FAST: "fast",
    "neighbors": "frozen embedding",
    "pca": "PCA",
    "harmony": "Harmony",
    "joint": "joint scVI",
    "logistic_regression": "logistic regression",
    "linear_svm": "linear SVM",
    "random_forest": "random forest",
    "scanvi": "scANVI",
    "scnym": "scNym",
    MODEL: "the model's classifier",
}
# Members of each recipe: with the batches of the query, and without, where a correction by batch would do harm.
_RECIPES = {
    CONSENSUS: (("joint", "harmony", "logistic_regression"), ("joint", "logistic_regression")),
    FAST: (("harmony", "logistic_regression"), ("pca", "logistic_regression")),
}
METHODS = (*_RECIPES, *_CLASSES)
# Annotators with the argument `steps`.
_TRAINED = ("joint", "scanvi")
# Simple methods, to compare with.
BASELINES = ("pca", "logistic_regression")


def check_method(method: str) -> None:
    """UserError if the method is unknown."""
    if method not in METHODS:
        raise UserError(f"method is {method!r}{suggestion(method, list(METHODS))}; choose one of {', '.join(METHODS)}")


def members_of(method: str, *, batches_known: bool = True) -> tuple[str, ...]:
    """Names of the annotators of which a method consists; one for a single annotator.

    Parameters
    ----------
    method
        Name of a recipe or of an annotator.
    batches_known
        Whether the batches of the query's cells are known.
    """
    check_method(method)
    if method not in _RECIPES:
        return (method,)
    return _RECIPES[method][0 if batches_known else 1]


def create(
    name: str,
    *,
    n_neighbors: int = NEIGHBORS,
    steps: int = STEPS,
    scnym: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Annotator:
    """An annotator by name.

    Parameters
    ----------
    name
        Name of an annotator.
    n_neighbors
        Neighbors per cell, for those that vote.
    steps
        Training steps, for those that train a joint model.
    scnym
        Hyper-parameters of scNym's method that replace those of its preset, and the name of the `preset`.
    seed
        Random seed.
    """
    training: dict[str, Any] = {"steps": steps} if name in _TRAINED else {}
    if name == ScNym.name and scnym:
        overrides = {key: value for key, value in scnym.items() if key != "preset"}
        training = {"overrides": overrides, **({"preset": scnym["preset"]} if "preset" in scnym else {})}
    made: Annotator = _CLASSES[name](n_neighbors=n_neighbors, seed=seed, **training)
    return made
