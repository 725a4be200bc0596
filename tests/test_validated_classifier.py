"""A saved classifier's calibration and its rule for unknown cells, set on its validation cells; its saved form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from census_scvi.annotation.scnym.classifier import Classifier, Prediction
from census_scvi.annotation.scnym.network import CellTypeClassifier
from census_scvi.annotation.scnym.settings import hyperparameters
from census_scvi.annotation.scnym.trained import Trained, as_annotation
from census_scvi.annotation.scnym.validated import CELLS, Validated
from census_scvi.annotation.validation.held_out import HeldOut
from census_scvi.errors import UserError

CLASSES, N_HIDDEN = ["B cell", "NK cell", "T cell"], 8


def predicted(codes: np.ndarray, seed: int, *, sharpness: float = 1.0) -> tuple[Prediction, np.ndarray]:
    """A prediction, and true types, 70 to 100 % of which are right as the probability says; sharpened if asked for.

    The embedding has a cluster per type; code 3 is a type that the classifier does not know, far from all others.
    """
    numbers = np.random.default_rng(seed)
    centres = np.eye(4, N_HIDDEN) * 12
    embedding = (centres[codes] + numbers.normal(size=(len(codes), N_HIDDEN))).astype(np.float32)
    given = np.where(codes == 3, 0, codes)
    probability = np.zeros((len(codes), 3))
    certain = numbers.uniform(0.7, 1, len(codes))
    probability[:] = (1 - certain[:, None]) / 2
    probability[np.arange(len(codes)), given] = certain
    truth = np.array([numbers.choice(3, p=row) for row in probability])
    powers = probability**sharpness
    sharpened = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return Prediction(CLASSES, sharpened, embedding, np.zeros(len(codes), bool)), truth


@pytest.fixture(scope="module")
def validated() -> Validated:
    """Of a classifier that is much too certain; a third of its cells are of held-out donors."""
    prediction, truth = predicted(np.arange(1500) % 3, 0, sharpness=4.0)
    return Validated.of(prediction, truth, np.arange(1500) >= 1000, "donor_id", assumes_known=False, seed=0)


@pytest.fixture
def folder(validated: Validated, tmp_path: Path) -> Path:
    settings = hyperparameters("supervised", {"n_hidden": N_HIDDEN, "n_hidden_init": N_HIDDEN})
    torch_state = torch.get_rng_state()
    network = CellTypeClassifier(5, 3, settings)
    torch.set_rng_state(torch_state)
    classifier = Classifier(network, [f"gene{n}" for n in range(5)], CLASSES, settings, np.full(5, 0.2))
    Trained(classifier, {}, "homo_sapiens", "cell_type", validated).save(tmp_path / "model")
    return tmp_path / "model"


def test_probabilities_of_new_cells_are_calibrated_and_the_accuracy_is_that_of_the_validation_cells(
    validated: Validated,
) -> None:
    prediction, truth = predicted(np.arange(3000) % 3, 1, sharpness=4.0)
    found = validated.annotation(prediction)
    assert validated.temperature == pytest.approx(4, rel=0.25)
    names = np.array(CLASSES, dtype=object)
    raw, calibrated = (
        HeldOut.of(names[truth], (names[each.argmax(axis=1)], each.max(axis=1))).calibration_error
        for each in (prediction.probability, found.probability)
    )
    assert raw > 0.1 > 3 * calibrated
    assert found.labels.tolist() == prediction.labels.tolist()
    assert found.validation.loc["scnym", "accuracy"] == pytest.approx((found.labels == names[truth]).mean(), abs=0.04)
    assert found.facts["held_out_by"] == "donor_id"
    assert found.facts["validation_cells"] == 500
    assert any("measured on held-out values of donor_id" in warning for warning in found.warnings)


@pytest.mark.parametrize("sharpness", [0.5, 4.0])
def test_random_cells_of_the_same_samples_lower_probabilities_only(sharpness: float) -> None:
    prediction, truth = predicted(np.arange(1500) % 3, 0, sharpness=sharpness)
    found = Validated.of(prediction, truth, np.arange(1500) % 3 == 0, "cells", assumes_known=False, seed=0)
    assert found.temperature == pytest.approx(max(sharpness, 1), rel=0.25)
    warnings = found.annotation(prediction).warnings
    assert any("measured on random cells of the samples that it was trained on" in warning for warning in warnings)


def test_cells_far_from_all_types_are_unknown_and_known_ones_keep_their_label(validated: Validated) -> None:
    codes = np.repeat([0, 1, 2, 3], 100)
    prediction, _ = predicted(codes, 2)
    prediction.empty[:5] = True
    batch = np.where(np.arange(400) % 2, "mine", "yours").astype(object)
    found = validated.annotation(prediction, batch)
    assert found.unknown[codes == 3].all()
    assert found.unknown[:5].all()
    assert (found.uncertainty[:5] == 1).all()
    assert (~found.unknown[5:300]).mean() > 0.9
    assert ((found.uncertainty > 0.5) == found.unknown).all()
    assert set(found.facts["batches"]) == {"mine", "yours"}
    assert len(np.unique(found.groups)) == 6  # 400 cells, about 60 per group
    nothing = replace(prediction, empty=np.ones(400, bool))
    assert validated.annotation(nothing).unknown.all()


def test_a_classifier_without_validation_cells_says_so() -> None:
    prediction, truth = predicted(np.arange(60) % 3, 0)
    found = Validated.of(prediction, truth, np.zeros(60, bool), "cells", assumes_known=True, seed=0)
    assert (found.temperature, found.quality) == (1.0, {})
    annotation = found.annotation(prediction)
    assert annotation.validation.empty
    assert any("no cells were held out" in warning for warning in annotation.warnings)
    assert any("probably marks no cell of a missing type" in warning for warning in annotation.warnings)


def test_what_is_saved_gives_the_same_annotation(folder: Path, validated: Validated) -> None:
    trained = Trained.load(folder)
    assert trained.validated is not None
    assert np.bincount(trained.validated.codes).max() <= 200
    prediction, _ = predicted(np.arange(300) % 4, 3)
    before, after = validated.annotation(prediction), as_annotation(trained, prediction)
    for name in ("probability", "unknown", "uncertainty", "groups"):
        assert np.array_equal(getattr(before, name), getattr(after, name)), name
    assert before.facts == after.facts
    assert before.warnings == after.warnings


def test_a_folder_of_an_earlier_version_is_used_and_it_is_said_what_it_lacks(folder: Path) -> None:
    about = json.loads((folder / "genes.json").read_text())
    del about["validated"]
    (folder / "genes.json").write_text(json.dumps(about))
    prediction, _ = predicted(np.arange(300) % 4, 3)
    prediction.empty[:2] = True
    found = as_annotation(Trained.load(folder), prediction)
    assert np.array_equal(found.probability, prediction.probability)
    assert found.unknown.nonzero()[0].tolist() == [0, 1]
    (warning,) = found.warnings
    assert "probabilities of this classifier are not calibrated, and it does not mark cells of types" in warning


def in_record(**changes: Any) -> Any:
    def apply(folder: Path) -> None:
        about = json.loads((folder / "genes.json").read_text())
        about["validated"] |= changes
        (folder / "genes.json").write_text(json.dumps(about))

    return apply


def in_arrays(change: Any) -> Any:
    def apply(folder: Path) -> None:
        arrays = load_file(folder / CELLS)
        (folder / CELLS).unlink()
        save_file(change(arrays), folder / CELLS)

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        in_record(temperature=0),
        in_record(temperature=None),
        in_record(rule=[]),
        in_record(rule={"threshold": 1}),
        in_record(quality=None),
        in_record(surprise=1),
        in_arrays(lambda arrays: {"codes": arrays["codes"]}),
        in_arrays(lambda arrays: {**arrays, "codes": arrays["codes"] + 1}),
        in_arrays(lambda arrays: {**arrays, "embedding": arrays["embedding"][:, 1:].contiguous()}),
        in_arrays(lambda arrays: {**arrays, "embedding": arrays["embedding"] * float("nan")}),
        lambda folder: (folder / CELLS).write_bytes(b"cut"),
        lambda folder: (folder / CELLS).unlink(),
    ],
)
def test_a_damaged_folder_is_one_line(folder: Path, damage: Any) -> None:
    damage(folder)
    with pytest.raises(UserError, match=r"genes.json is damaged \(.*\); train the classifier again$") as error:
        Trained.load(folder)
    assert "\n" not in str(error.value)
