"""What annotators share: the cells they get, their interface, and the annotation of a query."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_scvi.annotation.ontology import LEVEL, Hierarchy

ALL_CELLS = "all"  # the only batch of a query, if its batches are not known
UNKNOWN = "unknown"  # label of a cell of a type that the reference probably lacks


@dataclass(frozen=True)
class Cells:
    """Reference and query together, without labels. The rows of the reference come first.

    Attributes
    ----------
    counts
        CSR (cells, genes): raw counts, the genes that reference and query have in common.
    batch
        object (cells,): technical batch of each cell.
    n_reference
        Number of reference cells: rows 0 to `n_reference` - 1; the others are the query.
    genes
        feature_ids of the columns.
    embedding
        float32 (cells, dimensions): the embedding by a trained model; None: there is no model.
    query_prefix
        What was put before the names of the query's batches, so that none is a batch of the reference.
    """

    counts: sp.csr_matrix
    batch: npt.NDArray[np.object_]
    n_reference: int
    genes: list[str]
    embedding: npt.NDArray[np.float32] | None = None
    query_prefix: str = ""

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def reference(self) -> npt.NDArray[np.int64]:
        """Rows of the reference."""
        return np.arange(self.n_reference)

    @property
    def query(self) -> npt.NDArray[np.int64]:
        """Rows of the query."""
        return np.arange(self.n_reference, len(self))

    @property
    def query_batch(self) -> npt.NDArray[np.object_]:
        """Batch of each query cell by the user's own name, object (query cells,); "all" if it is not known."""
        names = (str(name).removeprefix(self.query_prefix) for name in self.batch[self.n_reference :])
        return np.array([name or ALL_CELLS for name in names], dtype=object)


def batch_in_words(name: str) -> str:
    """A batch of `Cells.query_batch` in a message."""
    return "the query" if name == ALL_CELLS else f"batch {name} of the query"


class Annotator(Protocol):
    """A method that predicts labels of cells from labels of other cells.

    Held-out studies, excluded types and the query itself only differ in the rows passed to `predict`, so that what
    needs no labels is computed once.

    Attributes
    ----------
    name
        Name in settings, tables and columns.
    refits
        Whether `predict` trains a network, and is therefore expensive.
    space
        float32 (cells, dimensions): embedding of all cells that `fit` computed; None: the method has none.
    """

    name: str
    refits: bool
    space: npt.NDArray[np.float32] | None

    def fit(self, cells: Cells) -> None:
        """Compute what needs no labels: log-normalised counts, PCA, a joint embedding."""

    def predict(
        self,
        train: npt.NDArray[np.int64],
        codes: npt.NDArray[np.int64],
        n_classes: int,
        test: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """Probabilities of the classes for some cells.

        Parameters
        ----------
        train
            (training cells,): rows of labelled cells.
        codes
            (training cells,): their classes, 0 to `n_classes` - 1.
        n_classes
            Number of classes; a class without training cells gets probability 0.
        test
            (test cells,): rows of the cells to annotate.

        Returns
        -------
        float32 (test cells, n_classes); the rows sum to 1.
        """
        ...


@dataclass(frozen=True)
class Annotation:
    """Annotation of the cells of a query.

    Attributes
    ----------
    classes
        The labels of the reference, sorted.
    probability
        float32 (cells, classes): calibrated probabilities of the method.
    members
        The same for each annotator of which the method consists, by name.
    unknown
        bool (cells,): cells of a type that the reference probably lacks.
    uncertainty
        float32 (cells,), 0 to 1: scaled distance score; 0.5 at the threshold of `unknown`.
    groups
        int64 (cells,): groups of similar query cells.
    embedding
        float32 (cells, dimensions): joint embedding of the query cells; without one, the PCA.
    validation
        Accuracy on held-out cells of the reference, one row per method; empty if nothing can be held out.
    compared
        Calibrated probabilities of the methods that it is compared with, by name.
    warnings
        What the user should know, one sentence each.
    facts
        Other measured numbers: expected quality of `unknown`, state of each batch, costs.
    """

    classes: list[str]
    probability: npt.NDArray[np.float32]
    members: dict[str, npt.NDArray[np.float32]]
    unknown: npt.NDArray[np.bool_]
    uncertainty: npt.NDArray[np.float32]
    groups: npt.NDArray[np.int64]
    embedding: npt.NDArray[np.float32]
    validation: pd.DataFrame
    compared: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> npt.NDArray[np.object_]:
        """The most probable label of each cell: object (cells,)."""
        return np.array(self.classes, dtype=object)[self.probability.argmax(axis=1)]

    @property
    def name_threshold(self) -> float:
        """Probability from which a label, or a term above it, is given as a name; see `ontology.back_off`."""
        return float(self.facts.get("name_threshold", LEVEL))


@dataclass(frozen=True)
class Annotated:
    """Annotation of a query with one column of labels.

    Attributes
    ----------
    labels
        Name of the column.
    annotation
        The annotation.
    hierarchy
        Terms of its labels.
    method
        The method.
    n_neighbors
        Neighbors per cell; None: no neighbors were searched.
    n_with_counts
        Number of reference cells whose counts were used; 0: none.
    """

    labels: str
    annotation: Annotation
    hierarchy: Hierarchy
    method: str
    n_neighbors: int | None = None
    n_with_counts: int = 0
