"""What the validation cells of a trained classifier tell: calibrated probabilities and a threshold for unknown cells.

The temperature, the accuracy and the rule for unknown cells are set on the labelled cells that early stopping used.
The weights are those of the epoch that fits these cells best, so that all three are slightly optimistic. Whole donors
are held out where there are any; else the cells are random cells of the samples that the classifier was trained on.

The score of unknown cells is a distance in the last hidden layer. This layer was trained with all types, also with the
ones that are excluded to set the threshold, so that the share of them that is found says little about types that the
classifier does not know, and is not reported. docs/scnym.md has the share of real cells that is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file

from census_scvi.annotation.ontology import LEVEL, calibrated_threshold
from census_scvi.annotation.protocol import ALL_CELLS, Annotation
from census_scvi.annotation.results.groups import similar_cells
from census_scvi.annotation.scnym.classifier import Prediction
from census_scvi.annotation.unknown.rule import Batch, HeldOutCells, UnknownRule, agree, apply_rule, set_rule
from census_scvi.annotation.validation.calibration import Probability, fit_temperature, with_temperature, without_type
from census_scvi.annotation.validation.folds import BY_CELLS
from census_scvi.annotation.validation.held_out import HeldOut
from census_scvi.config.random_streams import Stream, generator
from census_scvi.files.atomic import replacing
from census_scvi.files.json_values import json_values

NAME, CELLS = "scnym", "training_cells.safetensors"
_MOST_CELLS = 200  # training cells per type whose embedding is kept

Rows = npt.NDArray[np.int64]


class _Record(BaseModel):
    """What is saved as JSON; a number that is not known is null."""

    model_config = ConfigDict(extra="forbid")

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    held_out_by: str
    validation_cells: Annotated[int, Field(ge=0)]
    assumes_known: bool
    quality: dict[str, float | None]
    name_threshold: Annotated[float, Field(ge=0, le=1)]
    rule: UnknownRule


@dataclass(frozen=True)
class Validated:
    """Calibration of a classifier, and its rule for unknown cells.

    Attributes
    ----------
    temperature
        Temperature of the calibrated probabilities.
    held_out_by
        Column whose values are held out; `cells`: random cells.
    validation_cells
        Number of held-out cells.
    assumes_known
        Whether unlabelled cells were trained to be of known types, however uncertain their predictions were.
    quality
        Accuracy and calibration error of the held-out cells (`HeldOut`, without the curves); empty without such cells.
    name_threshold
        As of `Annotation`.
    rule
        Rule for unknown cells.
    embedding, codes
        float32 (cells, hidden units), int64 (cells,): embedding and class of training cells, at most 200 per class.
    """

    temperature: float
    held_out_by: str
    validation_cells: int
    assumes_known: bool
    quality: dict[str, float]
    name_threshold: float
    rule: UnknownRule
    embedding: npt.NDArray[np.float32]
    codes: Rows

    @classmethod
    def of(
        cls,
        prediction: Prediction,
        codes: Rows,
        validation: npt.NDArray[np.bool_],
        held_out_by: str,
        *,
        assumes_known: bool,
        seed: int,
    ) -> Validated:
        """Calibrate, and set the rule.

        Parameters
        ----------
        prediction
            Prediction of labelled cells.
        codes, validation
            (cells,): their true classes, and whether early stopping used them.
        held_out_by, assumes_known
            As in the attributes.
        seed
            Seed of the choice of cells.
        """
        n_classes = len(prediction.classes)
        test = np.flatnonzero(validation & ~prediction.empty)
        train = _some_of_each(np.flatnonzero(~validation & ~prediction.empty), codes, seed)
        truth, raw = codes[test], prediction.probability[test]
        # Random cells of the same samples are easier than cells of another study: they never make labels more certain.
        least = 1.0 if held_out_by == BY_CELLS else 0.0
        temperature = max(fit_temperature(raw, truth), least)
        probability = with_temperature(raw, temperature)
        across = _calibrated_across(raw, truth, least)
        part = HeldOutCells(train, codes[train], test, truth, {NAME: probability}, partial(_without, probability))
        rule = set_rule(
            {NAME: prediction.embedding},
            [part] if len(test) else [],
            train,
            codes[train],
            n_classes,
            seed,
            limited=held_out_by != BY_CELLS,
        )
        return cls(
            temperature,
            held_out_by,
            len(test),
            assumes_known,
            _quality(prediction, truth, across, seed) if len(test) else {},
            calibrated_threshold(across, truth) if len(test) else LEVEL,
            rule,
            prediction.embedding[train],
            codes[train],
        )

    def annotation(self, prediction: Prediction, batch: npt.NDArray[np.object_] | None = None) -> Annotation:
        """The annotation of a query.

        Parameters
        ----------
        prediction
            Prediction of its cells.
        batch
            object (cells,): their batches; None: not known.
        """
        probability = with_temperature(prediction.probability, self.temperature)
        scores, batches = self._scores(prediction, probability, batch)
        excess = scores - self.rule.threshold
        return Annotation(
            classes=prediction.classes,
            probability=probability,
            members={NAME: probability},
            unknown=excess > 0,
            uncertainty=(1 / (1 + np.exp(-np.clip(2 * excess, -30, 30)))).astype(np.float32),
            groups=similar_cells(prediction.embedding),
            embedding=prediction.embedding,
            validation=pd.DataFrame.from_dict({NAME: self.quality} if self.quality else {}, orient="index"),
            warnings=list(self._warnings(batches)),
            facts=self._facts(batches),
        )

    def _scores(
        self, prediction: Prediction, probability: Probability, batch: npt.NDArray[np.object_] | None
    ) -> tuple[npt.NDArray[np.float64], dict[str, Batch]]:
        """Scores of all cells, infinite for cells without counts, and the state of each batch."""
        scores = np.full(len(probability), np.inf)
        filled = np.flatnonzero(~prediction.empty)
        if not len(filled):
            return scores, {}
        names = np.full(len(probability), ALL_CELLS, dtype=object) if batch is None else batch
        n_kept = len(self.codes)
        scores[filled], batches = apply_rule(
            self.rule,
            {NAME: np.concatenate([self.embedding, prediction.embedding[filled]])},
            np.arange(n_kept),
            self.codes,
            len(prediction.classes),
            n_kept + np.arange(len(filled)),
            names[filled],
            agree({NAME: probability[filled]}),
        )
        return scores, batches

    def _warnings(self, batches: dict[str, Batch]) -> Iterator[str]:
        if not self.validation_cells:
            yield (
                "no cells were held out of the classifier's training: its probabilities are not calibrated, and the"
                " threshold of unknown cells is not measured"
            )
        elif self.held_out_by == BY_CELLS:
            yield (
                "accuracy, probabilities and thresholds of the classifier are measured on random cells of the samples"
                " that it was trained on; a query of another study has a lower accuracy"
            )
        else:
            yield (
                f"accuracy, probabilities and thresholds of the classifier are measured on held-out values of"
                f" {self.held_out_by}; a query of another study may have a lower accuracy"
            )
        if self.assumes_known:
            yield (
                "the classifier was trained as if all unlabelled cells were of known types, and probably marks no cell"
                " of a missing type (none of three types in a test on blood); if there may be any, train it with"
                " annotate.preset=new_identity_discovery"
            )
        elif self.validation_cells:
            yield (
                "few cells of missing types may be found: in a test on blood, 86 % of B cells, 33 % of CD14 monocytes"
                " and no NK cells with annotate.preset=new_identity_discovery"
            )
        for name, batch in batches.items():
            if batch.far:
                yield batch.warning(name)

    def _facts(self, batches: dict[str, Batch]) -> dict[str, Any]:
        return {
            "members": [NAME],
            "held_out_by": self.held_out_by,
            "validation_cells": self.validation_cells,
            "temperature": self.temperature,
            "known_kept": self.rule.known_kept,
            "threshold": self.rule.threshold,
            "batches": {name: {**asdict(batch), "far": batch.far} for name, batch in batches.items()},
            "name_threshold": self.name_threshold,
        }

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the embedding of the training cells into a folder; returns the other values, for its JSON."""
        arrays = {"embedding": torch.from_numpy(self.embedding), "codes": torch.from_numpy(self.codes)}
        with replacing([folder / CELLS]) as (partial_file,):
            save_file(arrays, partial_file)
            partial_file.chmod(0o644)  # safetensors lets only the owner read
        values = {name: getattr(self, name) for name in _Record.model_fields}
        found: dict[str, Any] = json_values(values | {"rule": asdict(self.rule)})
        return found

    @classmethod
    def load(cls, folder: Path, values: Any, n_classes: int, n_hidden: int) -> Validated:
        """Read what `save` wrote.

        Raises
        ------
        ValueError, OSError, SafetensorError
            It is damaged, or not of this classifier.
        """
        record = _Record.model_validate(_with_nan(values))
        arrays = load_file(folder / CELLS)
        embedding, codes = arrays["embedding"], arrays["codes"]
        if (
            embedding.dtype != torch.float32
            or codes.dtype != torch.int64
            or embedding.shape != (len(codes), n_hidden)
            or not len(codes)
            or not bool(torch.isfinite(embedding).all())
            or not bool(((codes >= 0) & (codes < n_classes)).all())
            or not set(record.rule.found_by_type) <= set(range(n_classes))
        ):
            raise ValueError(f"{CELLS} does not fit the classifier")
        quality = {name: float("nan") if value is None else value for name, value in record.quality.items()}
        return cls(
            record.temperature,
            record.held_out_by,
            record.validation_cells,
            record.assumes_known,
            quality,
            record.name_threshold,
            record.rule,
            embedding.numpy(),
            codes.numpy(),
        )


def _with_nan(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the rule that are null as NaN."""
    rule = {name: float("nan") if value is None else value for name, value in values["rule"].items()}
    return values | {"rule": rule}


def _some_of_each(rows: Rows, codes: Rows, seed: int) -> Rows:
    """At most 200 rows of each class, ascending."""
    mixed = generator(seed, Stream.CLASSIFIER_KEPT_CELLS).permutation(rows)
    chosen = [mixed[codes[mixed] == code][:_MOST_CELLS] for code in np.unique(codes[rows])]
    return np.sort(np.concatenate(chosen))


def _without(probability: Probability, code: int) -> dict[str, Probability]:
    return {NAME: without_type(probability, code)}


def _calibrated_across(raw: Probability, truth: Rows, least: float) -> Probability:
    """Probabilities of each half of the cells, calibrated on the other half, with at least some temperature."""
    found = np.empty_like(raw)
    even = np.arange(len(truth)) % 2 == 0
    for half in (even, ~even):
        found[half] = with_temperature(raw[half], max(fit_temperature(raw[~half], truth[~half]), least))
    return found


def _quality(prediction: Prediction, truth: Rows, probability: Probability, seed: int) -> dict[str, float]:
    names = np.array(prediction.classes, dtype=object)
    quality = HeldOut.of(names[truth], (names[probability.argmax(axis=1)], probability.max(axis=1)), seed)
    return {name: value for name, value in asdict(quality).items() if isinstance(value, float)}
