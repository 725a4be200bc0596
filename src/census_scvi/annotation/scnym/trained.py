"""A trained classifier of scNym's method for a user's cells: training on reference and query, saving, prediction."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import ValidationError
from safetensors import SafetensorError

from census_scvi.annotation.labelled.joined import Joined, query_batches
from census_scvi.annotation.ontology import build_hierarchy
from census_scvi.annotation.protocol import Annotated, Annotation
from census_scvi.annotation.results.groups import similar_cells
from census_scvi.annotation.scnym.cells import InFile, InMemory, Selected
from census_scvi.annotation.scnym.classifier import Classifier, Prediction
from census_scvi.annotation.scnym.interpret import Attribution, expected_gradients
from census_scvi.annotation.scnym.settings import NO_NEW_IDENTITY, hyperparameters, preset_named
from census_scvi.annotation.scnym.training import UNLABELLED
from census_scvi.annotation.scnym.training import Trained as Training
from census_scvi.annotation.scnym.training import train as train_classifier
from census_scvi.annotation.scnym.validated import NAME, Validated
from census_scvi.annotation.validation.folds import BY_CELLS
from census_scvi.errors import UserError
from census_scvi.files.atomic import write_json
from census_scvi.files.json_file import read_json
from census_scvi.model.published_record import first_problem
from census_scvi.query.alignment import AlignedCells
from census_scvi.query.cells import QueryCells

log = logging.getLogger(__name__)

ABOUT = "genes.json"
_FORMAT = 1
_TRAINING, _VALIDATED = "training", "validated"
_CONFIDENT = 0.5  # less confident pseudolabels are of cells that may be of any type


@dataclass(frozen=True)
class Trained:
    """A classifier, and what is needed to match a query's genes with it.

    Attributes
    ----------
    classifier
        The classifier.
    symbols
        Symbol of each gene by name.
    organism
        Organism of the genes.
    labels
        Name of the column of labels.
    validated
        Calibration and the rule for unknown cells; None: saved by a version that had neither.
    """

    classifier: Classifier
    symbols: Mapping[str, str]
    organism: str
    labels: str
    validated: Validated | None = None

    def save(self, folder: Path) -> None:
        """Write the classifier and the symbols of its genes into a folder."""
        self.classifier.save(folder)
        about = {"format": _FORMAT, "organism": self.organism, "labels": self.labels, "symbols": dict(self.symbols)}
        if self.validated is not None:
            about[_VALIDATED] = self.validated.save(folder)
        write_json(folder / ABOUT, about)

    @classmethod
    def load(cls, folder: Path) -> Trained:
        """Read a classifier; nothing in the folder is executed.

        Raises
        ------
        UserError
            There is none, or it is damaged or of another version.
        """
        classifier = Classifier.load(folder)
        try:
            about = read_json(folder / ABOUT)
            if about["format"] != _FORMAT:
                raise UserError(
                    f"{folder / ABOUT} has format {about['format']!r}, this version reads {_FORMAT}; train the"
                    " classifier again"
                )
            symbols = {str(gene): str(symbol) for gene, symbol in about["symbols"].items()}
            validated = None
            if _VALIDATED in about:
                shape = (len(classifier.classes), classifier.network.n_hidden)
                validated = Validated.load(folder, about[_VALIDATED], *shape)
            return cls(classifier, symbols, str(about["organism"]), str(about["labels"]), validated)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            if isinstance(error, FileNotFoundError) and not (folder / ABOUT).exists():  # saved without its reference
                return cls(classifier, {}, "homo_sapiens", "cell_type")
            problem = first_problem(error) if isinstance(error, ValidationError) else error
            raise UserError(f"{folder / ABOUT} is damaged ({problem}); train the classifier again") from None


def train_joined(
    joined: Joined,
    labels: str,
    organism: str,
    *,
    preset: str = NO_NEW_IDENTITY,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    folder: Path | None = None,
    where: str = "annotate.overrides",
) -> Trained:
    """Train a classifier on a reference, with the query as unlabelled cells.

    Parameters
    ----------
    joined
        Reference and query. If the batches of the query are known, every batch is a domain; else reference and query.
    labels, organism
        Recorded with the classifier.
    preset, overrides, where
        As for `hyperparameters`.
    seed
        Seed of everything that is random.
    folder
        Folder of the classifier; its subfolder `training` has the checkpoint and the TensorBoard log. None: neither.
    """
    cells, n_query = joined.cells, len(joined.query_rows)
    result = train_classifier(
        InMemory(cells.counts),
        cells.genes,
        np.concatenate([joined.labels[labels], np.full(n_query, UNLABELLED, dtype=object)]),
        hyperparameters(preset_named(preset), overrides, where=where),
        domains=cells.batch if joined.batches_known else None,
        donors=_donors(joined, n_query),
        seed=seed,
        folder=None if folder is None else folder / _TRAINING,
    )
    symbols = {gene: symbol for gene, symbol in zip(cells.genes, joined.symbols, strict=True) if symbol != gene}
    return Trained(result.classifier, symbols, organism, labels, _validated(result, joined, labels, seed))


def _validated(result: Training, joined: Joined, labels: str, seed: int) -> Validated:
    """Calibration and rule for unknown cells, on the cells that early stopping used."""
    classifier, n_labelled = result.classifier, joined.cells.n_reference
    codes = np.searchsorted(classifier.classes, joined.labels[labels].astype(str))
    validation = result.validation[:n_labelled]
    prediction = classifier.predict(InMemory(joined.cells.counts[:n_labelled]), classifier.genes)
    held_out_by = BY_CELLS
    if joined.units:
        name, donors = list(joined.units.items())[-1]  # as in `_donors`
        if set(donors[validation]).isdisjoint(donors[~validation]):
            held_out_by = name
    settings = classifier.settings
    assumes_known = n_labelled < len(joined.cells) and settings.unsup_max_weight > 0
    assumes_known &= settings.pseudolabel_min_confidence < _CONFIDENT
    return Validated.of(prediction, codes, validation, held_out_by, assumes_known=assumes_known, seed=seed)


def _donors(joined: Joined, n_query: int) -> npt.NDArray[np.object_] | None:
    """Study or donor of each cell for early stopping; None if they are not known."""
    if not joined.units:
        return None
    last = list(joined.units.values())[-1]  # the finest
    return np.concatenate([last, np.full(n_query, "query", dtype=object)])


def predict_trained(
    trained: Trained, query: QueryCells, *, counts: str | None = None, min_share: float = 0.8
) -> Prediction:
    """Predict the labels of a query of any size, which is read in blocks.

    Parameters
    ----------
    trained
        The classifier.
    query
        The open cells.
    counts
        Place of the raw counts; None: searched.
    min_share
        Required share of the classifier's genes (`AlignedCells`).

    Raises
    ------
    UserError
        There are no raw counts, or too few of the classifier's genes.
    """
    source, genes = _source(trained, query, counts, min_share)
    return trained.classifier.predict(source, genes)


def annotate_trained(
    trained: Trained,
    query: QueryCells,
    labels: str,
    *,
    counts: str | None = None,
    min_share: float = 0.8,
    batch_key: list[str] | None = None,
) -> Annotated:
    """Annotate a query of any size.

    Parameters
    ----------
    trained, query, counts, min_share
        As for `predict_trained`.
    labels
        Name of the labels in the results.
    batch_key
        obs columns of the query whose combinations are its batches; None: not known.
    """
    prediction = predict_trained(trained, query, counts=counts, min_share=min_share)
    annotation = as_annotation(trained, prediction, query_batches(query, batch_key) if batch_key else None)
    return Annotated(labels, annotation, build_hierarchy(annotation.classes), NAME)


def explain(
    trained: Trained,
    query: QueryCells,
    labels: npt.NDArray[np.object_],
    target: str,
    source: str = "all",
    *,
    counts: str | None = None,
    min_share: float = 0.8,
    n_cells: int = 300,
    seed: int = 0,
) -> Attribution:
    """Contributions of genes to the output of a class (expected gradients).

    Parameters
    ----------
    trained, query, counts, min_share
        As for `predict_trained`.
    labels
        (cells,): known or predicted label of each cell.
    target, source
        The label to explain, and the one with which it is compared; "all": all others.
    n_cells
        Maximum number of cells to explain.
    seed
        Seed of the choice of cells.
    """
    cells, genes = _source(trained, query, counts, min_share)
    against = None if source == "all" else source
    return expected_gradients(
        trained.classifier, cells, genes, labels, target, against=against, n_cells=n_cells, seed=seed
    )


def _source(trained: Trained, query: QueryCells, counts: str | None, min_share: float) -> tuple[Selected, list[str]]:
    """Counts of the query in the genes that it shares with a classifier, and their names."""
    classifier = trained.classifier

    def share(_: Any, genes: npt.NDArray[np.bool_]) -> float:
        return float(classifier.profile[genes].sum() / classifier.profile.sum())

    aligned = AlignedCells(
        query,
        classifier.genes,
        trained.symbols,
        trained.organism,
        min_share=min_share,
        counts=counts,
        expected=share,
        owner="classifier",
    )
    shared = aligned.shared
    source = Selected(InFile(query.matrix(aligned.place)), aligned.selection[:, shared])
    return source, [classifier.genes[column] for column in shared]


def as_annotation(trained: Trained, prediction: Prediction, batch: npt.NDArray[np.object_] | None = None) -> Annotation:
    """A prediction of a classifier as an annotation.

    Parameters
    ----------
    trained
        The classifier. One that was saved by a version without calibration gives probabilities that are not calibrated,
        and only its cells without counts are unknown.
    prediction
        Result of `predict_trained`.
    batch
        object (cells,): batch of each cell; None: not known.
    """
    if trained.validated is not None:
        return trained.validated.annotation(prediction, batch)
    return Annotation(
        classes=prediction.classes,
        probability=prediction.probability,
        members={"scnym": prediction.probability},
        unknown=prediction.empty,
        uncertainty=(1 - prediction.confidence).astype(np.float32),
        groups=similar_cells(prediction.embedding),
        embedding=prediction.embedding,
        validation=pd.DataFrame(),
        warnings=[
            "the probabilities of this classifier are not calibrated, and it does not mark cells of types that its"
            " reference lacks, since an earlier version saved it; train it again, or use annotate.method=consensus"
        ],
    )
