"""Interactive analysis with a trained model and the embedding of a Census, e.g. in a notebook."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import scvi
from matplotlib.figure import Figure

from census_scvi.annotation.annotate_labels import annotate_labels
from census_scvi.annotation.annotators.joint_model import STEPS
from census_scvi.annotation.annotators.neighbor_vote import NEIGHBORS
from census_scvi.annotation.labelled import several_values
from census_scvi.annotation.labelled.atlas import Counts, join_atlas
from census_scvi.annotation.labelled.joined import Joined
from census_scvi.annotation.labelled.labels import read_labels
from census_scvi.annotation.labelled.reference import STUDY_COLUMNS
from census_scvi.annotation.methods import CONSENSUS, MODEL, TITLES, check_method
from census_scvi.annotation.own_labels import annotate_by_model, require_own_labels
from census_scvi.annotation.protocol import Annotated
from census_scvi.annotation.results.columns import EMPTY, PREDICTION, add_results, results_of
from census_scvi.census.cells import require_columns
from census_scvi.census.genes import read_var
from census_scvi.census.open import Census
from census_scvi.census.settings import CensusSection, census_named
from census_scvi.census.slices import Embedding
from census_scvi.config.arguments import require_number, require_whole
from census_scvi.config.messages import suggestion
from census_scvi.errors import UserError
from census_scvi.files.atomic import remove
from census_scvi.files.paths import expand_argument
from census_scvi.files.uri import without_credentials
from census_scvi.model.published import load_described
from census_scvi.model.safe import ModelDescription, weights_digest
from census_scvi.model.typical import TypicalCells, typical_cells
from census_scvi.neighbors.clusters import composition, leiden
from census_scvi.neighbors.index import NeighborIndex
from census_scvi.neighbors.umap_map import UmapMap
from census_scvi.pictures.annotation_quality import draw_quality
from census_scvi.pictures.umap import draw_map
from census_scvi.query.atlas_cells import EMBEDDING, AtlasCells
from census_scvi.query.atlas_expression import differential_expression, normalized_expression
from census_scvi.query.cells import QuerySource, opened
from census_scvi.query.denoised import CellModels, denoised
from census_scvi.query.mapping import MIN_SHARE, Mapper
from census_scvi.query.places import named_after
from census_scvi.query.reference import Origin, open_embedding
from census_scvi.query.surgery.adapt import Reference, adapt
from census_scvi.query.surgery.adapted import Adapted, adapted_model, in_words, new_folder, work_of
from census_scvi.query.surgery.compare import Comparison, compare_ways, map_in_all_ways
from census_scvi.query.surgery.settings import JOINT, SEQUENTIAL, SurgeryTraining
from census_scvi.terminal.progress import show_messages

log = logging.getLogger(__name__)

OWN_EMBEDDING = "X_scvi"
_MODEL = "scvi_model"
SURGERY_FACTS = "scvi_surgery"
PROTEIN_REPORT = "scvi_proteins"
# Default numbers of cells of a reference (some 100 MB of latent positions) and of a slice.
REFERENCE_CELLS, SLICE_CELLS = 200_000, 1_000_000
# Default number of reference cells whose counts are read for the baselines; more change the result little.
BASELINE_CELLS = 10_000


@dataclass(frozen=True)
class Neighbors:
    """Nearest neighbors of query cells among the cells of the atlas.

    Attributes
    ----------
    joinids
        int64 (cells, neighbors): soma_joinids, nearest first.
    distances
        float32 (cells, neighbors): distances in the latent space.
    obs
        obs of the neighbors, one row per cell of the atlas, indexed by soma_joinid.
    """

    joinids: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    obs: pd.DataFrame


class Atlas:
    """A model, a Census and its embedding. Any of them may be missing; methods that need it then raise UserError.

    Use `Atlas.open` to create one.

    Attributes
    ----------
    model
        The scvi-tools model; None if there is none.
    description
        Genes, batches and organism of the model; None if there is none.
    """

    def __init__(
        self,
        model: tuple[scvi.model.SCVI, ModelDescription] | None,
        census: CensusSection | None,
        find_embedding: Callable[[Census], Embedding],
        *,
        census_given: bool,
        typical: Callable[[], TypicalCells | None] | None = None,
        adapted: Adapted | None = None,
    ) -> None:
        self.model: scvi.model.SCVI | None = model[0] if model else None
        self.description: ModelDescription | None = model[1] if model else None
        self._cells = AtlasCells(model, census, find_embedding)
        self._census_given, self._typical, self._adapted = census_given, typical, adapted
        self._find_embedding = find_embedding

    @classmethod
    def open(
        cls,
        model: str | Path | None = None,
        *,
        census: str | Path | None = None,
        embedding: str | Path | None = None,
        organism: str | None = None,
        tiledb: Mapping[str, str] | None = None,
    ) -> Self:
        """Open a model, a Census, or both.

        Parameters
        ----------
        model
            Published folder or its URL, run directory, or its `scvi.model`; or the folder of an adapted model that
            `adapt` or map-query wrote.
        census
            URI of the Census, or a release such as `stable` or `2025-11-08`. None: the Census in the model's record;
            it is opened when it is needed.
        embedding
            Embedding of the Census' cells: a name in obsm, a run directory, or the URI of an Experiment or of an array,
            such as CELLxGENE's community embeddings. None: the embedding published with the model, `latent.npy` of its
            run directory, or `obsm["scvi"]` of the Census.
        organism
            For example `homo_sapiens`; None: the model's organism.
        tiledb
            TileDB settings, such as `{"vfs.s3.region": "eu-west-1"}`, for a Census in a private bucket. They override
            the AWS environment, and apply in this process until another Census is opened.

        Raises
        ------
        UserError
            A model, Census or embedding cannot be opened, or the embedding belongs to another Census.
        """
        if model is None and census is None:
            raise UserError("an atlas needs a model, a Census or both: Atlas.open(model=..., census=...)")
        show_messages()
        model, census, embedding = (
            None if place is None else expand_argument(place, name)
            for name, place in (("model", model), ("census", census), ("embedding", embedding))
        )
        adapted = None if model is None else adapted_model(model)
        described = None if model is None else adapted.models[0] if adapted else load_described(model)
        if described and organism and described[1].organism != organism:
            raise UserError(f"the model is of {described[1].organism}, not {organism}")
        origin = Origin.of(model)
        name = organism or (described[1].organism if described else "homo_sapiens")
        section = census_named(census, name) if census is not None else origin.section
        if section is not None and tiledb:
            section = section.model_copy(update={"tiledb": dict(tiledb)})
        if embedding is not None and section is None:
            raise UserError("an embedding belongs to the cells of a Census: give it with census=")
        find = origin.open_embedding if embedding is None else partial(open_embedding, embedding)
        typical = partial(typical_cells, str(model), described[1].genes) if described else None
        atlas = cls(described, section, find, census_given=census is not None, typical=typical, adapted=adapted)
        if census is not None:
            with ExitStack() as stack:
                stack.callback(atlas.close)
                _ = atlas._cells.census
                if embedding is not None:
                    _ = atlas._cells.embedding
                stack.pop_all()
        return atlas

    def close(self) -> None:
        """Close the Census."""
        self._cells.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        description, census = self.description, self._cells.section
        model = (
            f"{description.summary}, {self.model.module.n_latent} dimensions"
            if description and self.model
            else "none: Atlas.open(model=...) to embed cells"
        )
        where = (
            without_credentials(census.uri) or f"release {census.version}"
            if census
            else "none: Atlas.open(census=...) for its cells and labels"
        )
        return f"Atlas\n  model   {model}\n  census  {where}"

    # --- cells of the atlas

    def embeddings(
        self,
        obs_filter: str | None = None,
        *,
        obs_columns: list[str] | None = None,
        max_cells: int = SLICE_CELLS,
        seed: int = 0,
    ) -> ad.AnnData:
        """Read cells of the Census with their embedding, without counts.

        Parameters
        ----------
        obs_filter
            For example `tissue_general == 'blood' and is_primary_data == True`; None: all cells.
        obs_columns
            obs columns to read in addition to soma_joinid; None: all.
        max_cells
            Maximum number of cells; if more match, this number is sampled at random.
        seed
            Seed of the sampling.

        Returns
        -------
        AnnData with obs, `obsm["scvi"]` float32 (cells, dimensions) and no X, in the order of the Census. Matching
        cells without an embedding are excluded, with a warning.
        """
        require_whole("max_cells", max_cells, 1)
        require_whole("seed", seed, 0)
        return self._cells.embedded(obs_filter, obs_columns, max_cells, seed)

    def umap(
        self, cells: ad.AnnData | str | None = None, color: str = "cell_type", *, max_cells: int = 50_000, seed: int = 0
    ) -> Figure:
        """Plot a UMAP of cells.

        Parameters
        ----------
        cells
            Result of `embeddings`, `embed` or `predict`, to which `obsm["X_umap"]` is added; or an obs_filter.
        color
            obs column for the colors.
        max_cells
            Maximum number of cells that are sampled for an obs_filter.
        seed
            Seed of the sampling and of UMAP.
        """
        chosen = self._slice(cells, [color], max_cells, seed)
        if color not in chosen.obs:
            raise UserError(f"color is {color!r}, which is not a column of obs{suggestion(color, list(chosen.obs))}")
        chosen.obsm["X_umap"] = UmapMap(_latent_of(chosen), seed=seed).positions
        return draw_map(chosen.obsm["X_umap"], chosen.obs[color], color.replace("_", " "))

    def clusters(
        self,
        cells: ad.AnnData | str | None = None,
        *,
        resolution: float = 1.0,
        columns: Sequence[str] = ("cell_type", "tissue", "dataset_id"),
        max_cells: int = 50_000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Compute Leiden clusters of cells, and describe their composition.

        Parameters
        ----------
        cells
            Result of `embeddings`, `embed` or `predict`, to which `obs["leiden"]` is added; or an obs_filter.
        resolution
            Leiden resolution; a higher value gives more clusters.
        columns
            obs columns that describe the clusters; columns that obs lacks are skipped.
        max_cells
            Maximum number of cells that are sampled for an obs_filter.
        seed
            Seed of the sampling and of the clustering.

        Returns
        -------
        One row per cluster, largest first: `n_cells`, and the most frequent value of each column with its share.
        """
        require_number("resolution", resolution, above=0)
        chosen = self._slice(cells, list(columns), max_cells, seed)
        chosen.obs["leiden"] = leiden(_latent_of(chosen), resolution, seed)
        return composition(chosen.obs, "leiden", columns)

    def _slice(self, cells: ad.AnnData | str | None, columns: list[str], max_cells: int, seed: int) -> ad.AnnData:
        """The given AnnData, or cells of the Census that match the filter."""
        require_whole("seed", seed, 0)
        if isinstance(cells, ad.AnnData):
            if not cells.n_obs:
                raise UserError("there are no cells: the AnnData is empty")
            return cells
        return self.embeddings(cells, obs_columns=columns, max_cells=max_cells, seed=seed)

    def normalized_expression(
        self,
        obs_filter: str | None,
        genes: list[str],
        transform_batch: str | list[str] | None,
        *,
        library_size: float = 1e4,
        n_samples: int = 1,
        max_cells: int = 100_000,
        seed: int = 0,
    ) -> ad.AnnData:
        """Compute the expression of Census cells as decoded by the model: denoised, and optionally batch-corrected.

        Parameters
        ----------
        obs_filter
            Cells of the Census; None: all.
        genes
            feature_ids or symbols.
        transform_batch
            Trained batches: the expression is decoded for each of them and averaged. None: each cell is decoded for its
            own batch, which must be a trained one.
        library_size
            Total counts per cell to scale to.
        n_samples
            Number of posterior samples, which are averaged.
        max_cells
            Maximum number of cells; if more match, this number is sampled at random.
        seed
            Seed of the cells and of the posterior samples.

        Returns
        -------
        AnnData, X float32 (cells, genes), var index as in `genes`. The values are those of scvi-tools'
        `get_normalized_expression`, read and decoded in blocks.

        Raises
        ------
        UserError
            The model lacks a gene or batch, or `transform_batch` is None and a cell's batch was not trained.
        """
        require_number("library_size", library_size, above=0)
        for name, value, least in (("n_samples", n_samples, 1), ("max_cells", max_cells, 1), ("seed", seed, 0)):
            require_whole(name, value, least)
        return normalized_expression(
            self._cells,
            obs_filter,
            genes,
            transform_batch,
            library_size=library_size,
            n_samples=n_samples,
            max_cells=max_cells,
            seed=seed,
        )

    def differential_expression(
        self,
        group_a: str,
        group_b: str,
        *,
        batch_correction: bool = True,
        fdr: float = 0.05,
        delta: float = 0.25,
        max_cells: int = 5_000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Compute differential expression between two groups of the Census' cells.

        Parameters
        ----------
        group_a, group_b
            obs filters, such as `cell_type == 'B cell'`; the groups must not overlap.
        batch_correction
            Decode each group for all its batches, and average over them.
        fdr
            False discovery rate of the column `is_de_fdr_<fdr>`.
        delta
            Minimum log2 fold change.
        max_cells
            Maximum number of cells per group; from a larger group, this number is sampled.
        seed
            Seed of the cells and of the posterior samples.

        Returns
        -------
        Result of scvi-tools' `differential_expression(mode="change")`: one row per gene, indexed by feature_id, most
        probable first, with the column `symbol`. Group 1 is `group_a`.

        Raises
        ------
        UserError
            The groups overlap, or have cells of batches that the model was not trained on.
        """
        require_number("fdr", fdr, above=0, most=1)
        require_number("delta", delta)
        require_whole("max_cells", max_cells, 1)
        require_whole("seed", seed, 0)
        return differential_expression(
            self._cells,
            group_a,
            group_b,
            batch_correction=batch_correction,
            fdr=fdr,
            delta=delta,
            max_cells=max_cells,
            seed=seed,
        )

    # --- the user's cells

    def adapt(
        self,
        source: QuerySource,
        batch_key: str | Sequence[str],
        *,
        mode: str = JOINT,
        training: Mapping[str, Any] | SurgeryTraining | None = None,
        folder: str | Path | None = None,
        work: str | Path | None = None,
        accelerator: str = "auto",
        seed: int = 0,
        counts: str | None = None,
        min_share: float = MIN_SHARE,
        proteins: str | None = None,
    ) -> Atlas:
        """Adapt the model to the batches of your own cells by surgery (scArches); the reference does not change.

        Parameters
        ----------
        source
            Cells as in `embed`.
        batch_key
            obs column (or columns) of the samples or donors of your cells.
        mode
            `joint`: one training with all batches; `per_batch`: one model for each batch; `sequential`: one batch after
            another.
        training
            Settings of `query.surgery_training`, such as `{"max_epochs": 100, "lr": 1e-3}`.
        folder
            Where to save the adapted model, a new folder; `Atlas.open` reads it. None: not saved.
        work
            Folder for checkpoints and trained models: a killed surgery continues there when it is called again. None:
            `<folder>.training`, which is removed at the end, or a temporary folder.
        accelerator
            Device of the training: auto, cpu, gpu.
        seed
            Seed of all random numbers.
        counts, min_share, proteins
            See `embed`.

        Returns
        -------
        An atlas that embeds and annotates cells of these batches with the adapted model; `surgery` has the facts. The
        embedding of its Census' cells remains valid: the latent of cells of the reference is the same before and after
        the training, which is checked. If surgery cannot change the embedding, the atlas embeds as this one does.

        Raises
        ------
        UserError
            The model cannot be adapted to these batches, a batch has too few cells, the loss is not finite, or the
            reference moved; nothing is saved then. Also see `embed`.
        """
        require_whole("seed", seed, 0)
        require_number("min_share", min_share, most=1)
        settings = SurgeryTraining.of(mode, training)
        if self._adapted is not None and len(self._adapted.models) > 1:
            raise UserError("this atlas has a model for each batch (mode per_batch): adapt the atlas of the reference")
        target = None if folder is None else new_folder(expand_argument(folder, "folder"))
        with ExitStack() as stack:
            if work is not None:
                place = Path(expand_argument(work, "work"))
            else:
                place = work_of(target) if target else Path(stack.enter_context(TemporaryDirectory()))
            aligned = stack.enter_context(
                self._mapper.align(source, counts=counts, min_share=min_share, proteins=proteins)
            )
            adapted = adapt(
                self._reference_model,
                aligned,
                _columns(batch_key),
                mode,
                settings,
                place,
                seed=seed,
                accelerator=accelerator,
            )
            if target is not None and adapted.models:
                adapted.save(target)
            if work is None:
                remove(place)
        return type(self)(
            adapted.models[0] if adapted.models else self._cells.model,
            self._cells.section,
            self._find_embedding,
            census_given=self._census_given,
            typical=self._typical,
            adapted=adapted,
        )

    def compare_mappings(
        self,
        source: QuerySource,
        batch_key: str | Sequence[str],
        *,
        labels: str | None = None,
        truth: str | None = None,
        obs_filter: str | None = None,
        training: Mapping[str, Any] | SurgeryTraining | None = None,
        max_cells: int = REFERENCE_CELLS,
        n_seeds: int = 3,
        folder: str | Path | None = None,
        accelerator: str = "auto",
        seed: int = 0,
        counts: str | None = None,
        min_share: float = MIN_SHARE,
        proteins: str | None = None,
    ) -> Comparison:
        """Map your own cells in several ways, and compare these: answers how to map them.

        The ways are surgery with all batches (`joint`), the same with other seeds (how much is noise), one model per
        batch at equal epochs and at equal optimiser steps, one batch after another in both orders, and no surgery.

        Parameters
        ----------
        source, batch_key, training, seed, counts, min_share, proteins
            As in `adapt`.
        labels
            obs column of the Census: labels that each way transfers to your cells by nearest neighbors, random forest
            and a network; None: labels are not compared.
        truth
            obs column of your cells with their true labels, under the same names; None: not known.
        obs_filter, max_cells
            Cells of the Census as reference, for `labels`.
        n_seeds
            Number of joint trainings, 2 or more.
        folder
            Folder for the trainings, in which a killed comparison continues when it is called again; None: a temporary
            folder.
        accelerator
            Device of the trainings: auto, cpu, gpu.

        Returns
        -------
        The latent of your cells by each way, a table with a row per way (`compare_ways`), and what follows from it in
        words.

        Raises
        ------
        UserError
            See `adapt`; or a column does not exist.
        """
        require_whole("seed", seed, 0)
        require_whole("n_seeds", n_seeds, 2)
        settings = SurgeryTraining.of(SEQUENTIAL, training)
        if labels is not None:
            require_columns(self._cells.census, [labels], "labels")
            reference = self.reference(obs_filter, [labels], max_cells, seed)
        with ExitStack() as stack:
            work = Path(expand_argument(folder or stack.enter_context(TemporaryDirectory()), "folder"))
            aligned = stack.enter_context(
                self._mapper.align(source, counts=counts, min_share=min_share, proteins=proteins)
            )
            if truth is not None and truth not in aligned.obs:
                near = suggestion(truth, list(map(str, aligned.obs.columns)))
                raise UserError(f"truth: the cells have no obs column {truth!r}{near}")
            known = None if truth is None else read_labels(aligned.obs[truth], f"obs[{truth!r}]")
            ways = map_in_all_ways(
                self._reference_model, aligned, _columns(batch_key), settings, work, self._mapper.as_one_batch,
                seed=seed, n_seeds=n_seeds, accelerator=accelerator,
            )  # fmt: skip
        if labels is None:
            return compare_ways(ways, seed=seed)
        named = read_labels(reference.obs[labels], labels)
        return compare_ways(ways, reference.obsm[EMBEDDING], named, known, seed=seed)

    @property
    def _reference_model(self) -> Reference:
        """The model as the reference of a surgery."""
        return Reference(*self._cells.model, self._typical() if self._typical else None)

    @property
    def _of_surgery(self) -> dict[str, str]:
        return {SURGERY_FACTS: in_words(self._adapted.facts)} if self._adapted else {}

    @property
    def surgery(self) -> dict[str, Any] | None:
        """Facts of the surgery of the model: mode, batches, cells, trainings, change of the reference; None: none."""
        return self._adapted.facts if self._adapted else None

    def embed(
        self,
        source: QuerySource,
        *,
        counts: str | None = None,
        min_share: float = MIN_SHARE,
        proteins: str | None = None,
    ) -> ad.AnnData:
        """Embed your own cells.

        Parameters
        ----------
        source
            AnnData, or path of a file of any size (.h5ad, zarr, 10x, Loom, CSV), with raw counts. It is not changed.
            Genes are identified by Ensembl id or symbol, in var_names or a column of var.
        counts
            Location of the raw counts: `X`, `raw` or `layers/<name>`; None: search for them.
        min_share
            Minimum share of the model's genes in the data. Fewer are accepted if the missing genes are expected to
            have hardly any counts, for example if genes without counts were removed.
        proteins
            For a TOTALVI model, the location of the raw protein counts: `obsm/<name>`, `features` (type Antibody
            Capture), or `none` for cells without proteins, which the model then imputes; None: search for them.

        Returns
        -------
        AnnData without X: your obs with `scvi_empty` (True for cells without counts in the model's genes),
        `obsm["X_scvi"]` float32 (cells, n_latent), and a report on the genes in `uns["scvi_alignment"]`, on the
        proteins in `uns["scvi_proteins"]`.

        Raises
        ------
        UserError
            The data has no raw counts, too few of the model's genes, none of its proteins, or another organism.
        """
        require_number("min_share", min_share, most=1)
        mapped = self._mapper(source, counts=counts, min_share=min_share, proteins=proteins)
        log.info("%s", mapped.report)
        if mapped.proteins is not None:
            log.info("%s", mapped.proteins)
        return ad.AnnData(
            obs=mapped.obs.assign(**{EMPTY: mapped.empty}),
            obsm={OWN_EMBEDDING: mapped.latent},
            uns={"scvi_alignment": mapped.report.as_dict(), _MODEL: self._model_identity, **self._of_surgery}
            | ({} if mapped.proteins is None else {PROTEIN_REPORT: mapped.proteins.as_dict()}),
        )

    def denoised(
        self,
        source: QuerySource,
        genes: Sequence[str] = (),
        transform_batch: str | Sequence[str] | None = None,
        *,
        library_size: float = 1e4,
        n_samples: int = 1,
        seed: int = 0,
        counts: str | None = None,
        min_share: float = MIN_SHARE,
        proteins: str | None = None,
    ) -> ad.AnnData:
        """Compute the expression of your own cells as decoded by the model: denoised, and batch-corrected.

        Parameters
        ----------
        source
            Cells as in `embed`.
        genes
            feature_ids or symbols; may be empty for a TOTALVI model.
        transform_batch
            Trained batches: the expression is decoded for each of them and averaged. None: each cell is decoded for its
            own batch, which needs a model that was adapted to it (`adapt`).
        library_size, n_samples, seed
            See `normalized_expression`.
        counts, min_share, proteins
            See `embed`.

        Returns
        -------
        AnnData with your obs, X float32 (cells, genes). For a TOTALVI model also two DataFrames of all its proteins,
        those that your cells lack included: `obsm["protein_expression"]`, the expression without background, and
        `obsm["protein_foreground"]`, the probability that a protein's counts are more than background. The values are
        those of scvi-tools' `get_normalized_expression` and `get_protein_foreground_probability`, in blocks.

        Raises
        ------
        UserError
            The model lacks a gene or batch, or `transform_batch` is None and the model was not adapted; also see
            `embed`.
        """
        require_number("library_size", library_size, above=0)
        require_number("min_share", min_share, most=1)
        for name, value, least in (("n_samples", n_samples, 1), ("seed", seed, 0)):
            require_whole(name, value, least)
        with self._mapper.align(source, counts=counts, min_share=min_share, proteins=proteins) as aligned:
            if self._adapted and self._adapted.models:
                models = CellModels.of_batches(self._adapted.models, self._adapted.places(aligned.obs))
            else:
                models = CellModels.of_one(self._cells.model, len(aligned))
            return denoised(
                aligned, models, genes, transform_batch, library_size=library_size, n_samples=n_samples, seed=seed
            )

    def predict(
        self,
        source: QuerySource,
        labels: str | Sequence[str] = "cell_type",
        *,
        split_labels: bool = False,
        obs_filter: str | None = None,
        method: str = CONSENSUS,
        batch_key: str | Sequence[str] | None = None,
        n_neighbors: int = NEIGHBORS,
        baseline_cells: int = BASELINE_CELLS,
        steps: int = STEPS,
        scnym: Mapping[str, Any] | None = None,
        max_cells: int = REFERENCE_CELLS,
        seed: int = 0,
        counts: str | None = None,
        min_share: float = MIN_SHARE,
        proteins: str | None = None,
        report: str | Path | None = None,
    ) -> ad.AnnData:
        """Annotate your own cells with labels of the atlas, and compare with simple methods.

        Parameters
        ----------
        source
            Input or result of `embed`; without a model, an AnnData with the vectors of your cells in obsm["X_scvi"].
        labels
            obs columns of the Census, one or more: `cell_type`, `tissue`, `disease`, ...
        split_labels
            Whether a reference cell with several values ("influenza || pneumonia" in `disease`) counts for each of
            them; else their combination is a label of its own.
        obs_filter
            Cells of the Census as reference; None: all. Cells with an uninformative label ("unknown") are excluded.
        method
            `consensus`: mean of three methods, one of them trained on reference and query; `fast`: of two without
            training; or a single method: `neighbors` (in this atlas' embedding), `pca`, `harmony`, `joint`,
            `logistic_regression`, `linear_svm`, `random_forest` (the last three on log-normalised counts), `scanvi`,
            `scnym`. `model`: the classifier of a SCANVI model itself, for the column that it has learned; it needs
            neither a Census nor labelled cells, and its probabilities are not calibrated.
        batch_key
            obs columns of your cells whose combinations are their technical batches (sample, donor); None: not known,
            and methods that correct batches are not part of `consensus` and `fast`.
        n_neighbors
            Neighbors per cell.
        baseline_cells
            Number of reference cells whose counts are read, the same number of every label where possible; 0: none, and
            only `neighbors` can be used.
        max_cells
            Maximum size of the reference; if more cells match, this number is sampled at random. If the embedding has
            an index (scvi-index.py), up to half of the reference are the nearest of all cells to yours.
        steps
            Training steps of the methods that train a network.
        scnym
            Hyper-parameters of the method `scnym` that replace those of its preset, and the name of the `preset`.
        seed
            Seed of all random numbers.
        counts, min_share, proteins
            See `embed`.
        report
            Where to write a report of each label: with NAME.html, NAME-<labels>.html, and its numbers next to it in a
            .json; None: no report.

        Returns
        -------
        Result of `embed` with `<labels>_predicted`, `_best`, `_probability`, `_uncertainty` and `_unknown` in obs. A
        cell of a type that the reference probably lacks is "unknown" in `_predicted`; `_best` keeps its most probable
        label. A cell without counts is "unknown" in every column. The label of each member of the method, and of the
        simple methods that it is compared with, is in `<labels>_<name>`; `<labels>_agreement` is the share of the
        members that give the best label, `<labels>_group` a group of similar cells.
        Labels that are terms of the Cell Ontology add `<labels>_ontology`, the most specific name that is certain
        enough ("T cell" for CD4 or CD8), its term id and probability, and the term id of the label (see
        `annotation.ontology.term_columns`).
        `uns["scvi_prediction"][<labels>]` describes the quality: `agreement` of the methods with the label, accuracy
        of each on `held_out` studies of the reference (see `HeldOut`; `draw_quality` plots it), the measured quality
        of "unknown", and `warnings`.

        Raises
        ------
        UserError
            See `embed`; or another model computed the embedding; or fewer cells than `n_neighbors` needs have a label;
            or `method` is unknown.
        """
        columns = [labels] if isinstance(labels, str) else list(dict.fromkeys(labels))
        for name, value, least in (
            ("n_neighbors", n_neighbors, 1),
            ("baseline_cells", baseline_cells, 0),
            ("steps", steps, 1),
        ):
            require_whole(name, value, least)
        if method == MODEL:
            return self._predict_by_model(source, columns, counts, min_share, proteins, report)
        check_method(method)
        require_columns(self._cells.census, columns, "labels")
        if not columns:
            return self._embedded(source, counts, min_share, proteins)
        _ = self._cells.embedding  # reports a damaged or foreign embedding before the cells are embedded
        mapped = self._embedded(source, counts, min_share, proteins)
        near = self._nearest(mapped, n_neighbors, obs_filter, max_cells)
        reference = self.reference(obs_filter, columns, max_cells, seed, near=None if near is None else near[1])
        with_counts = None
        if baseline_cells and self.model is not None and _holds_counts(source):
            with_counts = self._counts(source, mapped, reference, counts, min_share, baseline_cells)
        batches = [] if batch_key is None else _columns(batch_key)
        joined = join_atlas(
            mapped, reference, columns, with_counts, batch_key=batches, n_neighbors=n_neighbors, seed=seed,
            embedding=OWN_EMBEDDING, latent=EMBEDDING,
        )  # fmt: skip
        if split_labels:
            joined = several_values.split_labels(joined)
        annotated = annotate_labels(joined, method, n_neighbors=n_neighbors, steps=steps, scnym=scnym, seed=seed)
        empty = mapped.obs[EMPTY].to_numpy(dtype=bool)
        add_results(mapped, results_of(annotated, joined.query_rows, mapped.obs_names, quality=PREDICTION, empty=empty))
        if report is not None:
            self._report(Path(expand_argument(report, "report")), mapped, joined, annotated)
        return mapped

    def _predict_by_model(
        self,
        source: QuerySource,
        columns: list[str],
        counts: str | None,
        min_share: float,
        proteins: str | None,
        report: str | Path | None,
    ) -> ad.AnnData:
        """`predict` with the classifier of the model."""
        model, description = self._cells.model
        require_own_labels(description, columns)
        mapped = self._embedded(source, counts, min_share, proteins)
        empty = mapped.obs[EMPTY].to_numpy(dtype=bool)
        found = annotate_by_model(model, description, _latent_of(mapped), empty)
        rows = np.arange(mapped.n_obs)
        add_results(mapped, results_of([found], rows, mapped.obs_names, quality=PREDICTION, empty=empty))
        if report is not None:
            from census_scvi.report.annotation import Reported, write_annotation_report

            path = named_after(Path(expand_argument(report, "report")), found.labels, ".html")
            cells = ad.AnnData(obs=mapped.obs.copy())
            shown = Reported(found.labels, found.annotation, cells, hierarchy=found.hierarchy)
            facts = {"cells": f"{mapped.n_obs:,}", "annotators": TITLES[MODEL], "model": description.summary}
            write_annotation_report(path, [shown], facts=facts)
        return mapped

    def _report(self, path: Path, mapped: ad.AnnData, joined: Joined, annotated: list[Annotated]) -> None:
        """Write a report of each label."""
        from census_scvi.report.annotation import reported, write_annotation_report

        census = self._cells.census
        var = read_var(census)
        symbols = dict(zip(var["feature_id"].astype(str), var["feature_name"].astype(str), strict=True))
        refused = []
        if self.model is not None and (missing := len(mapped.uns["scvi_alignment"]["missing"])):
            refused.append(
                f"{missing:,} of {len(self._cells.model[1].genes):,} genes of the model are not in the cells' data"
            )
        if missing := len(mapped.uns.get(PROTEIN_REPORT, {}).get("missing", [])):
            refused.append(f"{missing} proteins of the model are not in the cells' data; the model imputes them")
        if empty := int(mapped.obs[EMPTY].sum()):
            refused.append(f"{empty:,} cells have no counts in the genes of the model; they are unknown")
        for found in annotated:
            facts = {
                "cells": f"{mapped.n_obs:,}",
                **({"surgery": mapped.uns[SURGERY_FACTS]} if SURGERY_FACTS in mapped.uns else {}),
                "reference": f"{joined.cells.n_reference:,} cells of {without_credentials(census.identity['uri'])}",
                "annotators": ", ".join(TITLES.get(name, name) for name in found.annotation.facts["members"]),
            }
            write_annotation_report(
                named_after(path, found.labels, ".html"),
                [reported(found, joined, symbols)],
                facts=facts,
                refused=refused,
            )

    def _counts(
        self,
        source: QuerySource,
        mapped: ad.AnnData,
        reference: ad.AnnData,
        counts: str | None,
        min_share: float,
        most_cells: int,
    ) -> Counts:
        """Counts of embedded cells, and of reference cells when they are needed."""
        genes = self._cells.model[1].genes

        def read(rows: npt.NDArray[np.int64]) -> sp.csr_matrix:
            blocks = self._cells.counts(reference.obs["soma_joinid"].to_numpy()[rows])
            return sp.vstack([block.counts for block in blocks], format="csr")

        query = sp.vstack(list(self._mapper.counts(source, counts=counts, min_share=min_share)), format="csr")
        return Counts(query, read, genes, ~np.isin(genes, mapped.uns["scvi_alignment"]["missing"]), most_cells)

    def quality(self, cells: ad.AnnData, labels: str = "cell_type") -> Figure:
        """Plot the quality of labels from `predict`: calibration and risk-coverage curves."""
        if labels not in (found := cells.uns.get(PREDICTION, {})):
            raise UserError(
                f"these cells have no predicted {labels}; predict it first: atlas.predict(cells, {labels!r})"
            )
        return draw_quality(found[labels], labels.replace("_", " "), TITLES)

    def neighbors(
        self,
        source: QuerySource,
        *,
        obs_filter: str | None = None,
        obs_columns: list[str] | None = None,
        n_neighbors: int = 15,
        max_cells: int = REFERENCE_CELLS,
        seed: int = 0,
        counts: str | None = None,
        min_share: float = MIN_SHARE,
        proteins: str | None = None,
    ) -> Neighbors:
        """Find the nearest neighbors of your own cells in the atlas.

        If the embedding has an index (scvi-index.py), all cells are searched, however many they are.

        Parameters
        ----------
        source
            Input or result of `embed`.
        obs_filter
            Cells of the Census to search; None: all.
        obs_columns
            obs columns of the neighbors to read; None: all.
        n_neighbors
            Neighbors per cell; if the atlas has fewer cells, all of them.
        max_cells
            Maximum number of cells to search without an index; if more match, this number is sampled at random.
        seed
            Seed of the sampling and of the neighbor index.
        counts, min_share, proteins
            See `embed`.
        """
        require_whole("n_neighbors", n_neighbors, 1)
        mapped = self._embedded(source, counts, min_share, proteins)
        if (near := self._nearest(mapped, n_neighbors, obs_filter, max_cells)) is not None:
            distances, joinids = near
            require_columns(self._cells.census, obs_columns or [], "obs_columns")
            obs = self._cells.obs(np.unique(joinids), self._with_terms(obs_columns)).set_index("soma_joinid")
            return Neighbors(joinids, distances, obs)
        reference = self.reference(obs_filter, obs_columns, max_cells, seed)
        index = NeighborIndex(reference.obsm[EMBEDDING], seed=seed)
        distances, positions = index.query(mapped.obsm[OWN_EMBEDDING], n_neighbors)
        joinids = reference.obs["soma_joinid"].to_numpy()[positions]
        obs = reference.obs.set_index("soma_joinid").loc[np.unique(joinids)]
        return Neighbors(joinids, distances, obs)

    def _embedded(self, source: QuerySource, counts: str | None, min_share: float, proteins: str | None) -> ad.AnnData:
        """The embedded cells; a result of `embed` by this model is copied, everything else is embedded."""
        if self.model is None:
            return self._given_vectors(source)
        if isinstance(source, ad.AnnData) and OWN_EMBEDDING in source.obsm and EMPTY in source.obs:
            if str(source.uns.get(_MODEL)) == self._model_identity:
                require_number("min_share", min_share, most=1)
                if counts is not None and _holds_counts(source):
                    with opened(source) as cells:
                        cells.find_counts(counts)
                return source.copy()
            if source.X is None:
                raise UserError("these cells were embedded by another model and have no counts; embed your own file")
        return self.embed(source, counts=counts, min_share=min_share, proteins=proteins)

    def _given_vectors(self, source: QuerySource) -> ad.AnnData:
        """Cells with the vectors that the user gives, because there is no model; without counts."""
        n_latent = self._cells.embedding.n_latent
        if not isinstance(source, ad.AnnData) or OWN_EMBEDDING not in source.obsm:
            raise UserError(
                "this needs a model: Atlas.open(model=...); or give an AnnData whose obsm['X_scvi'] has the vectors of"
                " your cells by the model of the atlas' embedding"
            )
        vectors = np.asarray(source.obsm[OWN_EMBEDDING])
        if vectors.shape[1:] != (n_latent,) or vectors.dtype.kind != "f" or not np.isfinite(vectors).all():
            raise UserError(
                f"obsm[{OWN_EMBEDDING!r}] of your cells is {vectors.dtype} {vectors.shape}; expected finite floats with"
                f" {n_latent} dimensions, as {without_credentials(self._cells.embedding.name)} has"
            )
        log.warning("without a model, nothing shows that your vectors are of the space of the atlas' embedding")
        cells = ad.AnnData(obs=source.obs.copy(), obsm={OWN_EMBEDDING: vectors.astype(np.float32)})
        cells.obs[EMPTY] = False
        return cells

    @cached_property
    def _model_identity(self) -> str:
        """SHA-256 of the weights of the model, or of those of each batch."""
        if self._adapted and len(self._adapted.models) > 1:
            return "+".join(weights_digest(model) for model, _ in self._adapted.models)
        return weights_digest(self._cells.model[0])

    def reference(
        self,
        obs_filter: str | None = None,
        obs_columns: list[str] | None = None,
        max_cells: int = REFERENCE_CELLS,
        seed: int = 0,
        *,
        near: npt.NDArray[np.int64] | None = None,
    ) -> ad.AnnData:
        """Read reference cells with `embeddings`, after a check that this model computed the embedding.

        Parameters
        ----------
        obs_filter, obs_columns, max_cells, seed
            As of `embeddings`; columns that an annotation needs are added to `obs_columns`.
        near
            int64 (cells, neighbors): soma_joinids of cells, nearest first, of which the reference shall have as many as
            fit in half of it.

        Raises
        ------
        UserError
            Another model computed the embedding: distances to your cells would be meaningless.
        """
        self._cells.require_embedding_of_model()
        require_whole("max_cells", max_cells, 1)
        require_whole("seed", seed, 0)
        return self._cells.embedded(obs_filter, self._with_terms(obs_columns), max_cells, seed, near)

    def _with_terms(self, obs_columns: list[str] | None) -> list[str] | None:
        """The columns, those of their ontology terms, and those of the studies; None: all columns."""
        if obs_columns is None:
            return None
        known = self._cells.census.experiment.obs.schema.names
        terms = [name for column in obs_columns if (name := f"{column}_ontology_term_id") in known]
        return list(dict.fromkeys([*obs_columns, *terms, *STUDY_COLUMNS]))

    def _nearest(
        self, mapped: ad.AnnData, n_neighbors: int, obs_filter: str | None, max_cells: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] | None:
        """Distances and soma_joinids of the nearest of all cells to embedded cells; None: search a sample instead."""
        self._cells.require_embedding_of_model()
        require_whole("max_cells", max_cells, 1)
        points = np.asarray(mapped.obsm[OWN_EMBEDDING], np.float32)
        return self._cells.nearest(points, n_neighbors, obs_filter, max_cells)

    @cached_property
    def _mapper(self) -> Mapper:
        model, description = self._cells.model
        symbols = {}
        if self._census_given:  # the Census has symbols of all genes, the model only of its own
            var = read_var(self._cells.census)
            symbols = dict(zip(var["feature_id"].astype(str), var["feature_name"].astype(str), strict=True))
        encoder = self._adapted.encoder if self._adapted and self._adapted.models else None
        return Mapper(model, description, symbols, self._typical_counts, encoder)

    def _typical_counts(self) -> sp.csr_matrix | None:
        cells = self._typical() if self._typical else None
        return None if cells is None else cells.counts


def _columns(names: str | Sequence[str]) -> list[str]:
    """Names of columns, given as one name or several."""
    return [names] if isinstance(names, str) else list(names)


def _holds_counts(source: QuerySource) -> bool:
    return not isinstance(source, ad.AnnData) or source.X is not None or bool(source.layers) or source.raw is not None


def _latent_of(cells: ad.AnnData) -> npt.NDArray[np.float32]:
    """Embedding of cells of the Census or of the user's cells, float32; UserError if there is none."""
    for name in (EMBEDDING, OWN_EMBEDDING):
        if name in cells.obsm:
            return np.asarray(cells.obsm[name], np.float32)
    raise UserError(
        f"the cells have no obsm[{EMBEDDING!r}] or obsm[{OWN_EMBEDDING!r}]; embed them first: atlas.embed(cells)"
    )
