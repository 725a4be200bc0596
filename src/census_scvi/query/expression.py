"""Normalised and differential expression of cells of a Census, only for batches that the model was trained on."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TypeAlias

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import scvi

from census_scvi.config.messages import suggestion
from census_scvi.config.run_names import LABELS, PROTEIN_NAMES, PROTEINS
from census_scvi.errors import UserError
from census_scvi.model.build import without_training
from census_scvi.model.encode import extend_batches
from census_scvi.model.safe import ModelDescription
from census_scvi.model.seeded import seeded
from census_scvi.query.mapping import query_batch

log = logging.getLogger(__name__)

Values: TypeAlias = npt.NDArray[np.float32]

# Maximum number of untrained batches listed in a message.
_MOST_NAMED = 3


@dataclass(frozen=True)
class Decoder:
    """Expression decoded by a model; the decoder uses the batch.

    Attributes
    ----------
    model, description
        The trained model.
    """

    model: scvi.model.SCVI
    description: ModelDescription

    def check_genes(self, genes: list[str]) -> list[str]:
        """feature_ids of genes given by id or symbol; UserError for a gene that the model does not have."""
        if not genes or isinstance(genes, str):
            raise UserError(f"genes is {genes!r}; expected a list of one or more, by feature_id or symbol")
        by_symbol = dict(zip(self.description.symbols, self.description.genes, strict=False))
        known = set(self.description.genes)
        found = []
        for gene in genes:
            if gene not in known and gene not in by_symbol:
                near = suggestion(gene, [*by_symbol, *known])
                raise UserError(f"{gene!r} is not one of the model's {len(known):,} genes{near}")
            found.append(gene if gene in known else by_symbol[gene])
        return found

    def check_batches(self, batches: list[str]) -> None:
        """UserError for a batch that the model was not trained on."""
        trained = self.description.batches
        if not batches:
            raise UserError("transform_batch is empty; give trained batches (listed in atlas.description.batches)")
        for batch in batches:
            if batch not in trained:
                near = suggestion(batch, trained)
                raise UserError(
                    f"transform_batch {batch!r} is not one of the {len(trained)} trained batches{near}; they are"
                    " listed in the"
                    " model's description (atlas.description.batches)"
                )

    def untrained(self, labels: npt.NDArray[np.object_]) -> npt.NDArray[np.bool_]:
        """Cells of batches that the model was not trained on, bool (cells,)."""
        return ~pd.Series(labels).isin(self.description.batches).to_numpy()

    def refuse_untrained(self, labels: npt.NDArray[np.object_], way_out: str) -> None:
        """UserError if a cell is of a batch that the model was not trained on; `way_out` says what to do."""
        unknown = self.untrained(labels)
        if unknown.any():
            names = sorted(set(labels[unknown]))
            more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            raise UserError(
                f"{int(unknown.sum()):,} of {len(labels):,} cells are from batches that the model was not trained on"
                f" ({', '.join(names[:_MOST_NAMED])}{more}): their decoded expression is meaningless."
                f" {way_out}"
            )

    def for_untrained(self, labels: npt.NDArray[np.object_]) -> tuple[Decoder, npt.NDArray[np.object_]]:
        """A decoder for cells of which some are of untrained batches, and the batch of each cell in it.

        An encoder with batches gets the mean of the trained ones for them, as everywhere where cells are embedded.
        """
        unknown = self.untrained(labels)
        if not unknown.any():
            return self, labels
        decoder, label = self, self.description.batches[0]
        if self.description.arguments["encode_covariates"]:
            label = query_batch(self.description)
            extended = extend_batches(self.model, self.description.genes, [label])
            batches = [*self.description.batches, label]
            decoder = Decoder(extended, replace(self.description, batches=batches))
        return decoder, np.where(unknown, label, labels)

    def normalised(
        self,
        counts: sp.csr_matrix,
        labels: npt.NDArray[np.object_],
        genes: list[str],
        transform_batch: list[str] | None,
        *,
        library_size: float,
        n_samples: int,
        seed: int,
        proteins: Values | None = None,
    ) -> Values:
        """scvi-tools' `get_normalized_expression`, float32 (cells, genes).

        Parameters
        ----------
        counts
            CSR float32 (cells, genes of the model).
        labels
            Batch of each cell.
        genes
            feature_ids of the genes to return.
        transform_batch
            Batches to decode with; the result is their mean. None: the batch of each cell.
        library_size
            Library size to scale the expression to, in counts per cell.
        n_samples
            Number of draws from the posterior, which are averaged.
        seed
            Seed of these draws.
        proteins
            float32 (cells, proteins of the model), for TOTALVI.
        """
        # TOTALVI of scvi-tools multiplies by the library size once for each batch of transform_batch.
        own_size = 1.0 if self.description.proteins else library_size
        with seeded(seed), without_training():
            found = self.model.get_normalized_expression(
                self._cells(counts, labels, proteins),
                transform_batch=transform_batch,
                gene_list=genes,
                library_size=own_size,
                n_samples=n_samples,
                return_numpy=False,
            )
        of_genes = found[0] * library_size if self.description.proteins else found
        return of_genes[genes].to_numpy(np.float32)

    def of_proteins(
        self,
        counts: sp.csr_matrix,
        labels: npt.NDArray[np.object_],
        transform_batch: list[str] | None,
        proteins: Values,
        *,
        n_samples: int,
        seed: int,
    ) -> tuple[Values, Values]:
        """Denoised protein expression (without background) and foreground probability of TOTALVI.

        Both are float32 (cells, proteins of the model), as scvi-tools' `get_normalized_expression` and
        `get_protein_foreground_probability` give them; parameters as in `normalised`.
        """
        cells = self._cells(counts, labels, proteins)
        drawn = {"transform_batch": transform_batch, "n_samples": n_samples, "return_numpy": True}
        with seeded(seed), without_training():
            _, denoised = self.model.get_normalized_expression(cells, gene_list=[], **drawn)
            foreground = self.model.get_protein_foreground_probability(cells, **drawn)
        return denoised.astype(np.float32), foreground.astype(np.float32)

    def differential(
        self,
        counts: sp.csr_matrix,
        labels: npt.NDArray[np.object_],
        in_first: npt.NDArray[np.bool_],
        *,
        batch_correction: bool,
        fdr: float,
        delta: float,
        seed: int,
        proteins: Values | None = None,
    ) -> pd.DataFrame:
        """scvi-tools' `differential_expression` in mode "change": the first group compared with the other cells.

        Returns
        -------
        scvi-tools' table with the additional column `symbol`: one row per gene, indexed by feature_id, the most
        probable first. Of TOTALVI also one per protein, `<name>_protein`.
        """
        with seeded(seed), without_training():
            found = self.model.differential_expression(
                self._cells(counts, labels, proteins),
                idx1=in_first,
                idx2=~in_first,
                mode="change",
                delta=delta,
                batch_correction=batch_correction,
                fdr_target=fdr,
                silent=True,
            )
        symbols = dict(zip(self.description.genes, self.description.symbols, strict=False))
        found.insert(0, "symbol", [symbols.get(gene, gene) for gene in found.index])
        return found

    def _cells(self, counts: sp.csr_matrix, labels: npt.NDArray[np.object_], proteins: Values | None) -> ad.AnnData:
        obs = pd.DataFrame(
            {"batch": pd.Categorical(labels, categories=self.description.batches)},
            index=[str(row) for row in range(len(labels))],
        )
        if self.description.labels:  # SCANVI reads a label of each cell; the expression does not depend on it
            obs[LABELS] = self.description.unlabeled_category
        cells = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=self.description.genes))
        if proteins is not None:
            cells.obsm[PROTEINS] = proteins
            cells.uns[PROTEIN_NAMES] = self.description.proteins
        return cells


def warn_where_groups_are_batches(
    labels: npt.NDArray[np.object_], in_first: npt.NDArray[np.bool_], *, batch_correction: bool
) -> None:
    """Warn if two groups share no batch: integration may then remove the difference between them."""
    first, second = set(labels[in_first]), set(labels[~in_first])
    if not first & second:
        log.warning(
            "the groups share no batch (%d and %d batches): the model treats differences between batches as technical,"
            " and %s. Compare groups within the same batches, or compare counts summed per donor (pseudobulk)",
            len(first),
            len(second),
            "batch_correction averages it out"
            if batch_correction
            else "a difference that is found may be a batch effect",
        )
