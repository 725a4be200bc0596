"""A user's own cells in a model's latent space, in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import scvi

from census_scvi.model.encode import Encoder, extend_batches
from census_scvi.model.safe import ModelDescription
from census_scvi.query.alignment import AlignedCells, AlignmentReport
from census_scvi.query.cells import QueryCells
from census_scvi.query.expected import ExpectedCounts
from census_scvi.terminal.progress import progress_bar

# Default of query.min_share and of min_share=: a tenth of the genes costs little, half costs much.
MIN_SHARE = 0.8
_BLOCK_CELLS = 4096
# The batch that an encoder which looks at it is told for cells of batches that it does not know.
_QUERY_BATCH = "query"


@dataclass(frozen=True)
class Mapped:
    """Cells in the latent space.

    Attributes
    ----------
    obs
        The user's obs, in its order.
    latent
        float32 (cells, n_latent): posterior means.
    empty
        bool (cells,): cells without any count in the model's genes; their position is meaningless.
    report
        Report on the genes.
    """

    obs: pd.DataFrame
    latent: npt.NDArray[np.float32]
    empty: npt.NDArray[np.bool_]
    report: AlignmentReport


class Mapper:
    """Embeds cells that a user brings.

    Parameters
    ----------
    model, description
        The trained model.
    symbols
        Symbols of genes by feature_id, in addition to those that the model knows.
    typical
        Gives CSR float32 (cells, genes of the model): raw counts of some cells of the kind that the model was trained
        on, or None. They give the share of the counts in genes that a query lacks.
    """

    def __init__(
        self,
        model: scvi.model.SCVI,
        description: ModelDescription,
        symbols: Mapping[str, str] | None = None,
        typical: Callable[[], sp.csr_matrix | None] | None = None,
    ) -> None:
        self._description = description
        known = dict(zip(description.genes, description.symbols, strict=False))
        self._symbols = known | dict(symbols or {})
        self._n_trained = len(description.batches)
        if description.arguments["encode_covariates"]:
            model = extend_batches(model, description.genes, [_QUERY_BATCH])
        self._encode = Encoder(model)
        self._expected = ExpectedCounts(model, self._n_trained, typical)

    def __call__(
        self, source: ad.AnnData | str | Path, *, counts: str | None = None, min_share: float = MIN_SHARE
    ) -> Mapped:
        """Embed cells.

        Parameters
        ----------
        source
            AnnData, or the path of an .h5ad of any size, with raw counts; it is not changed.
        counts
            Place of the raw counts: `X`, `raw` or `layers/<name>`; None: search them.
        min_share
            Share of the model's genes that must be there; fewer will do where hardly any counts are expected in the
            others (`AlignedCells`).

        Raises
        ------
        UserError
            No raw counts, too few of the model's genes, another organism: what was found, and what to do.
        """
        latent, empty = [], []
        with self.align(source, counts=counts, min_share=min_share) as aligned:
            for block in _shown(aligned, "embed"):
                latent.append(self._encode(block, np.full(block.shape[0], self._n_trained)).mean)
                empty.append(np.diff(block.indptr) == 0)
            return Mapped(aligned.obs.copy(), np.concatenate(latent), np.concatenate(empty), aligned.report)

    def counts(
        self, source: ad.AnnData | str | Path, *, counts: str | None = None, min_share: float = MIN_SHARE
    ) -> Iterator[sp.csr_matrix]:
        """Raw counts of cells, CSR float32 (some cells, genes of the model), one block after the other."""
        with self.align(source, counts=counts, min_share=min_share) as aligned:
            yield from _shown(aligned, "baselines")

    @contextmanager
    def align(
        self, source: ad.AnnData | str | Path, *, counts: str | None = None, min_share: float = MIN_SHARE
    ) -> Iterator[AlignedCells]:
        """Cells in the model's genes; parameters and errors as of `__call__`."""
        with QueryCells(source) as cells:
            yield AlignedCells(
                cells,
                self._description.genes,
                self._symbols,
                self._description.organism,
                min_share=min_share,
                counts=counts,
                expected=self._expected.share,
            )


def _shown(cells: AlignedCells, what: str) -> Iterator[sp.csr_matrix]:
    """Blocks of raw counts, with a progress bar."""
    with progress_bar(len(cells), what) as bar:
        for _, block in cells.blocks(_BLOCK_CELLS):
            yield block
            bar.update(block.shape[0])
