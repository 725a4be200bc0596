"""Embed a user's cells in the latent space of a model, in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import scvi

from census_scvi.config.types import NO_PROTEINS
from census_scvi.model.encode import Encoder, extend_batches
from census_scvi.model.safe import ModelDescription
from census_scvi.query.alignment import AlignedCells, AlignmentReport
from census_scvi.query.cells import QuerySource, opened
from census_scvi.query.expected import ExpectedCounts
from census_scvi.query.protein_alignment import ProteinReport
from census_scvi.terminal.progress import progress_bar

# Default of query.min_share and of min_share=. A tenth of the genes missing costs little quality, half of them costs
# much.
MIN_SHARE = 0.8
_BLOCK_CELLS = 4096
# Batch of the query's cells for an encoder that uses the batch.
_QUERY_BATCH = "query"

# Protein counts, float32 (cells, proteins of the model); None for a model without proteins.
Proteins: TypeAlias = "npt.NDArray[np.float32] | None"
# Latent positions, float32 (cells, n_latent), of the cells from a row on, with these counts of genes and of proteins.
BlockEncoder: TypeAlias = Callable[[int, sp.csr_matrix, Proteins], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Mapped:
    """Cells in the latent space.

    Attributes
    ----------
    obs
        obs of the user's cells, in their order.
    latent
        float32 (cells, n_latent): posterior means.
    empty
        bool (cells,): cells without counts in the model's genes; their position is meaningless.
    report
        Report on the match of the genes.
    proteins
        Report on the match of the proteins; None for a model without proteins.
    """

    obs: pd.DataFrame
    latent: npt.NDArray[np.float32]
    empty: npt.NDArray[np.bool_]
    report: AlignmentReport
    proteins: ProteinReport | None = None


class Mapper:
    """Embeds a user's cells.

    Parameters
    ----------
    model, description
        The trained model.
    symbols
        Symbols of genes by feature_id, in addition to those of the model.
    typical
        Function that returns raw counts of some cells like those that the model was trained on, CSR float32 (cells,
        genes of the model), or None. They are used to estimate the share of the counts in genes that a query lacks.
    encoder
        Function that returns the encoder of cells with this obs; the encoder gets the row of the first cell of a block
        and its counts, CSR float32 (cells, genes of the model), and those of proteins. None: the model encodes all
        cells, and the batch of a query is in the middle of the trained ones.
    """

    def __init__(
        self,
        model: scvi.model.SCVI,
        description: ModelDescription,
        symbols: Mapping[str, str] | None = None,
        typical: Callable[[], sp.csr_matrix | None] | None = None,
        encoder: Callable[[pd.DataFrame], BlockEncoder] | None = None,
    ) -> None:
        self._description = description
        known = dict(zip(description.genes, description.symbols, strict=False))
        self._symbols = known | dict(symbols or {})
        self._n_trained = len(description.batches)
        if description.arguments["encode_covariates"]:
            model = extend_batches(model, description.genes, [query_batch(description)])
        self._encode = Encoder(model)
        self._encoder = encoder or (lambda obs: self.as_one_batch)
        self._expected = ExpectedCounts(model, self._n_trained, typical)

    def __call__(
        self,
        source: QuerySource,
        *,
        counts: str | None = None,
        min_share: float = MIN_SHARE,
        proteins: str | None = None,
    ) -> Mapped:
        """Embed cells.

        Parameters
        ----------
        source
            AnnData, path of a file of any size, or open cells, with raw counts; it is not changed.
        counts
            Place of the raw counts: `X`, `raw` or `layers/<name>`; None: search all places.
        min_share
            Required share of the model's genes; a smaller share is sufficient if few counts are expected in the missing
            genes (`AlignedCells`).
        proteins
            For a model with proteins, their place: `obsm/<name>`, `features`, or `none` for cells without proteins;
            None: search all places.

        Raises
        ------
        UserError
            There are no raw counts, too few of the model's genes or none of its proteins, or the organism differs.
        """
        latent, empty = [], []
        with self.align(source, counts=counts, min_share=min_share, proteins=proteins) as aligned:
            encode = self._encoder(aligned.obs)
            for start, block, of_proteins in _shown(aligned, "embed"):
                latent.append(encode(start, block, of_proteins))
                empty.append(np.diff(block.indptr) == 0)
            report = None if aligned.proteins is None else aligned.proteins.report
            return Mapped(aligned.obs.copy(), np.concatenate(latent), np.concatenate(empty), aligned.report, report)

    def as_one_batch(self, start: int, block: sp.csr_matrix, proteins: Proteins) -> npt.NDArray[np.float32]:
        """Latent positions of cells whose batch is in the middle of the trained ones; a `BlockEncoder`."""
        return self._encode(block, np.full(block.shape[0], self._n_trained), proteins).mean

    def counts(
        self, source: QuerySource, *, counts: str | None = None, min_share: float = MIN_SHARE
    ) -> Iterator[sp.csr_matrix]:
        """Raw counts of the cells in blocks, CSR float32 (some cells, genes of the model)."""
        with self.align(source, counts=counts, min_share=min_share, proteins=NO_PROTEINS) as aligned:
            for _, block, _ in _shown(aligned, "baselines"):
                yield block

    @contextmanager
    def align(
        self,
        source: QuerySource,
        *,
        counts: str | None = None,
        min_share: float = MIN_SHARE,
        proteins: str | None = None,
    ) -> Iterator[AlignedCells]:
        """The cells with the model's genes and proteins; parameters and errors as in `__call__`."""
        with opened(source) as cells:
            yield AlignedCells(
                cells,
                self._description.genes,
                self._symbols,
                self._description.organism,
                min_share=min_share,
                counts=counts,
                expected=self._expected.share,
                protein_names=self._description.proteins,
                proteins=proteins,
            )


def query_batch(description: ModelDescription) -> str:
    """Name of the batch of a query, which is not one of the trained batches."""
    name = _QUERY_BATCH
    while name in description.batches:
        name += "_"
    return name


def _shown(cells: AlignedCells, what: str) -> Iterator[tuple[int, sp.csr_matrix, Proteins]]:
    """Blocks of (first row, raw counts of genes, of proteins), with a progress bar."""
    with progress_bar(len(cells), what) as bar:
        for start, block, proteins in cells.blocks_with_proteins(_BLOCK_CELLS):
            yield start, block, proteins
            bar.update(block.shape[0])
